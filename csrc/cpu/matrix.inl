// Tile registers of AMX, or arrays that behave like them: 16 rows of 64 bytes. Multiplies voxels × pairs of
// channels by pairs × output channels; products are exact, sums float32, subnormal numbers read as zero.

#if defined(TUCKER_EMULATED)
extern int64_t tucker_matrix_stores;  // see tests/emulated
#endif

namespace tucker_ops::cpu {
namespace {

constexpr int64_t kMatrixRows = 16;

// Registers 0 to 3 hold sums of up to 16 voxels × LANES channels, 4 and 5 voxels, 6 and 7 weights.
constexpr int kVoxelRegister = 4, kWeightRegister = 6;

#if defined(__AMX_BF16__)

class MatrixUnit {
 public:
  // `voxels` rows of sums and voxels; `units` pairs of channels at a time. Clears all registers.
  void configure(int64_t voxels, int64_t units) {
    alignas(64) Layout layout = {};
    layout.palette = 1;
    for (int i = 0; i < 8; ++i) {
      layout.rows[i] = i < kWeightRegister ? voxels : units;
      layout.bytes[i] = kVoxelRegister <= i && i < kWeightRegister ? 4 * units : 64;
    }
    asm volatile("ldtilecfg %0" : : "m"(layout));
    configured_ = true;
  }
  ~MatrixUnit() {
    if (configured_) asm volatile("tilerelease");
  }

  template <int I>
  TUCKER_INLINE void zero() const {
    asm volatile("tilezero %%tmm%c0" : : "i"(I));
  }
  template <int I>
  TUCKER_INLINE void load(const void* from, int64_t bytes_between_rows) const {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(bytes_between_rows), "i"(I) : "memory");
  }
  template <int I>
  TUCKER_INLINE void store(float (&to)[kMatrixRows * LANES]) const {
    const int64_t between = sizeof(float) * LANES;
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(between), "i"(I) : "memory");
#if defined(TUCKER_EMULATED)
    ++tucker_matrix_stores;
#endif
  }
  template <int SUM, int VOXELS, int WEIGHTS>
  TUCKER_INLINE void multiply_add() const {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(VOXELS), "i"(WEIGHTS));
  }

 private:
  struct Layout {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  bool configured_ = false;
};

#else

class MatrixUnit {
 public:
  void configure(int64_t voxels, int64_t units) {
    voxels_ = voxels;
    units_ = units;
  }

  template <int I>
  void zero() {
    for (auto& row : registers_[I])
      for (uint32_t& value : row) value = 0;
  }
  template <int I>
  void load(const void* from, int64_t bytes_between_rows) {
    const bool weights = I >= kWeightRegister;
    for (int64_t r = 0; r < (weights ? units_ : voxels_); ++r)
      __builtin_memcpy(registers_[I][r], static_cast<const char*>(from) + r * bytes_between_rows,
                       weights ? 4 * LANES : 4 * units_);
  }
  template <int I>
  void store(float (&to)[kMatrixRows * LANES]) const {
    __builtin_memcpy(to, registers_[I], sizeof(float) * voxels_ * LANES);
  }
  // First channels and second channels of the pairs are summed apart, as the instruction does.
  template <int SUM, int VOXELS, int WEIGHTS>
  void multiply_add() {
    for (int64_t voxel = 0; voxel < voxels_; ++voxel)
      for (int64_t lane = 0; lane < LANES; ++lane) {
        float first = 0, second = 0, sum;
        for (int64_t k = 0; k < units_; ++k) {
          const uint32_t a = registers_[VOXELS][voxel][k], b = registers_[WEIGHTS][k][lane];
          first += low(a) * low(b);
          second += high(a) * high(b);
        }
        __builtin_memcpy(&sum, &registers_[SUM][voxel][lane], sizeof(sum));
        sum += first + second;
        __builtin_memcpy(&registers_[SUM][voxel][lane], &sum, sizeof(sum));
      }
  }

 private:
  static float low(uint32_t pair) { return to_float(bfloat16{static_cast<uint16_t>(pair)}); }
  static float high(uint32_t pair) { return to_float(bfloat16{static_cast<uint16_t>(pair >> 16)}); }

  int64_t voxels_ = 0, units_ = 0;
  uint32_t registers_[8][kMatrixRows][LANES] = {};
};

#endif

}  // namespace
}  // namespace tucker_ops::cpu
