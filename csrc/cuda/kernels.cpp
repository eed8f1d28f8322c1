#include "kernels.h"

namespace tucker_ops::cuda {

extern const KernelTable kFp16Kernels, kBf16Kernels, kTf32Kernels, kFp32Kernels;

namespace {

const KernelTable& table_of(Kind kind) {
  switch (kind) {
    case Kind::kFp16: return kFp16Kernels;
    case Kind::kBf16: return kBf16Kernels;
    case Kind::kTf32: return kTf32Kernels;
    default: return kFp32Kernels;
  }
}

}  // namespace

const std::vector<StreamForm>& stream_forms(Kind kind) {
  static const std::vector<StreamForm> forms[4] = {kFp16Kernels.stream_forms(), kBf16Kernels.stream_forms(), kTf32Kernels.stream_forms(),
                                                   kFp32Kernels.stream_forms()};
  return forms[static_cast<int>(kind)];
}

const std::vector<GatherForm>& gather_forms(Kind kind) {
  static const std::vector<GatherForm> forms[4] = {kFp16Kernels.gather_forms(), kBf16Kernels.gather_forms(), kTf32Kernels.gather_forms(),
                                                   kFp32Kernels.gather_forms()};
  return forms[static_cast<int>(kind)];
}

int stream_shared_bytes(Kind kind, int form, int channels, bool moments) {
  return table_of(kind).stream_shared_bytes(form, channels, moments);
}

int gather_shared_bytes(Kind kind, int form, int channels, bool moments) { return table_of(kind).gather_shared_bytes(form, channels, moments); }

std::string start_stream(Kind kind, int form, const StreamParams& p, int batch, void* stream) {
  return table_of(kind).start_stream(form, p, batch, stream);
}

std::string start_gather(Kind kind, int form, const GatherParams& p, int batch, void* stream) {
  return table_of(kind).start_gather(form, p, batch, stream);
}

std::string start_pack(Kind kind, const PackParams& p, int jobs, void* stream) { return table_of(kind).start_pack(p, jobs, stream); }

std::string start_covariance(Kind kind, const CovarianceParams& p, int batch, void* stream) {
  return table_of(kind).start_covariance(p, batch, stream);
}

std::string start_merge(Kind kind, const MergeParams& p, void* stream) { return table_of(kind).start_merge(p, stream); }

}  // namespace tucker_ops::cuda
