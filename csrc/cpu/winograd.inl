// Winograd's minimal filtering F(m×m, 3×3), m = 2 or 4, on vectors of channels.
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, section 4.

namespace tucker_ops::cpu {
namespace {

// One line of Bᵀd and of Aᵀm, on every `stride`-th vector.
template <int M>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int points = 4;

  static TUCKER_INLINE void input(const Vec (&d)[4], Vec* out, int64_t stride) {
    out[0] = d[0] - d[2];
    out[stride] = d[1] + d[2];
    out[2 * stride] = d[2] - d[1];
    out[3 * stride] = d[1] - d[3];
  }

  static TUCKER_INLINE void output(const Vec (&m)[4], Vec* out, int64_t stride) {
    out[0] = m[0] + m[1] + m[2];
    out[stride] = m[1] - m[2] - m[3];
  }
};

template <>
struct Winograd<4> {
  static constexpr int points = 6;

  static TUCKER_INLINE void input(const Vec (&d)[6], Vec* out, int64_t stride) {
    const Vec even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1];
    const Vec even2 = d[4] - d[2], odd2 = d[3] - d[1];
    out[0] = 4 * d[0] + (d[4] - 5 * d[2]);
    out[stride] = even + odd;
    out[2 * stride] = even - odd;
    out[3 * stride] = even2 + 2 * odd2;
    out[4 * stride] = even2 - 2 * odd2;
    out[5 * stride] = 4 * d[1] + (d[5] - 5 * d[3]);
  }

  static TUCKER_INLINE void output(const Vec (&m)[6], Vec* out, int64_t stride) {
    const Vec sum = m[1] + m[2], difference = m[1] - m[2];
    const Vec sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    out[0] = m[0] + sum + sum2;
    out[stride] = difference + 2 * difference2;
    out[2 * stride] = sum + 4 * sum2;
    out[3 * stride] = difference + 8 * difference2 + m[5];
  }
};

// Bᵀ d B of one block: `points` rows and columns of d to `points`² vectors, `point_stride` floats apart.
template <int M>
TUCKER_INLINE void transform_input(const float* d, int64_t row_stride, float* out, int64_t point_stride) {
  constexpr int P = Winograd<M>::points;
  Vec half[P * P];
  for (int i = 0; i < P; ++i) {
    Vec line[P];
    for (int j = 0; j < P; ++j) line[j] = *reinterpret_cast<const Vec*>(d + i * row_stride + j * LANES);
    Winograd<M>::input(line, half + i * P, 1);
  }
  for (int j = 0; j < P; ++j) {
    Vec line[P], result[P];
    for (int i = 0; i < P; ++i) line[i] = half[i * P + j];
    Winograd<M>::input(line, result, 1);
    for (int i = 0; i < P; ++i) *reinterpret_cast<Vec*>(out + (i * P + j) * point_stride) = result[i];
  }
}

// Aᵀ m A of one block: the inverse layout of transform_input to m × m vectors of output.
template <int M, class U>
TUCKER_INLINE void transform_output(const float* m, int64_t point_stride, U* out, int64_t row_stride) {
  constexpr int P = Winograd<M>::points;
  Vec half[M * P];
  for (int j = 0; j < P; ++j) {
    Vec line[P];
    for (int i = 0; i < P; ++i) line[i] = *reinterpret_cast<const Vec*>(m + (i * P + j) * point_stride);
    Winograd<M>::output(line, half + j, P);
  }
  for (int i = 0; i < M; ++i) {
    Vec line[P], result[M];
    for (int j = 0; j < P; ++j) line[j] = half[i * P + j];
    Winograd<M>::output(line, result, 1);
    for (int j = 0; j < M; ++j) store(out + i * row_stride + j * kUnits<U>, result[j]);
  }
}

}  // namespace
}  // namespace tucker_ops::cpu
