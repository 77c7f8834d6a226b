// The transforms between conv_relu_pool's patches and their products in Winograd's form. No include
// guard, like the other files of kernels.

inline constexpr float kNear = 0.75f, kFar = 1.5f;  // the points
inline constexpr float kNear2 = kNear * kNear, kFar2 = kFar * kFar;

// A row or a column of a patch, Bᵀ d.
FASTNET_INLINE void points_of_patch(const Vec<float> (&d)[kSide], Vec<float> (&v)[kSide]) {
  using V = Vec<float>;
  const V even_near = d[4] - d[2] * kFar2, odd_near = (d[3] - d[1] * kFar2) * kNear;
  const V even_far = d[4] - d[2] * kNear2, odd_far = (d[3] - d[1] * kNear2) * kFar;
  v[0] = d[0] * (kNear2 * kFar2) + (d[4] - d[2] * (kNear2 + kFar2));
  v[1] = even_near + odd_near;
  v[2] = even_near - odd_near;
  v[3] = even_far + odd_far;
  v[4] = even_far - odd_far;
  v[5] = d[1] * (kNear2 * kFar2) + (d[5] - d[3] * (kNear2 + kFar2));
}

FASTNET_INLINE void points_of_patch(const Vec<float> (&d)[kHalfSide], Vec<float> (&v)[kHalfSide]) {
  using V = Vec<float>;
  const V even = d[2] * (kNear2 - kFar2), odd = d[1] * (kNear * (kNear2 - kFar2));
  v[0] = d[0] * (kNear2 * kFar2) - d[2] * kFar2;
  v[1] = even + odd;
  v[2] = even - odd;
  v[3] = d[3] - d[1] * kNear2;
}

// What the values of a filter, G g, are multiplied by.
inline constexpr float kScaleZero = 1 / (kNear2 * kFar2);
inline constexpr float kScaleNear = 1 / (2 * kNear2 * (kNear2 - kFar2));
inline constexpr float kScaleFar = 1 / (2 * kFar2 * (kFar2 - kNear2));

// A row or a column of a filter, G g, from the even and the odd part of its values.
FASTNET_INLINE void scale_points(Vec<float> first, Vec<float> even_near, Vec<float> odd_near,
                                 Vec<float> even_far, Vec<float> odd_far, Vec<float> last,
                                 Vec<float> (&u)[kSide]) {
  u[0] = first * kScaleZero;
  u[1] = (even_near + odd_near * kNear) * kScaleNear;
  u[2] = (even_near - odd_near * kNear) * kScaleNear;
  u[3] = (even_far + odd_far * kFar) * kScaleFar;
  u[4] = (even_far - odd_far * kFar) * kScaleFar;
  u[5] = last;
}
FASTNET_INLINE void points_of_filter(const Vec<float> (&g)[3], Vec<float> (&u)[kSide]) {
  scale_points(g[0], g[0] + g[2] * kNear2, g[1], g[0] + g[2] * kFar2, g[1], g[2], u);
}
FASTNET_INLINE void points_of_filter(const Vec<float> (&g)[5], Vec<float> (&u)[kSide]) {
  scale_points(g[0], g[0] + (g[2] + g[4] * kNear2) * kNear2, g[1] + g[3] * kNear2,
               g[0] + (g[2] + g[4] * kFar2) * kFar2, g[1] + g[3] * kFar2, g[4], u);
}

// A row or a column of the convolution's output, Aᵀ m.
FASTNET_INLINE void outputs_of_points(const Vec<float> (&m)[kSide], Vec<float> (&y)[4]) {
  using V = Vec<float>;
  const V near = m[1] + m[2], far = m[3] + m[4];
  const V odd_near = (m[1] - m[2]) * kNear, odd_far = (m[3] - m[4]) * kFar;
  y[0] = m[0] + (near + far);
  y[1] = odd_near + odd_far;
  y[2] = near * kNear2 + far * kFar2;
  y[3] = m[5] + (odd_near * kNear2 + odd_far * kFar2);
}
FASTNET_INLINE void outputs_of_points(const Vec<float> (&m)[kSide], Vec<float> (&y)[2]) {
  y[0] = m[0] + ((m[1] + m[2]) + (m[3] + m[4]));
  y[1] = m[5] + ((m[1] - m[2]) * kNear + (m[3] - m[4]) * kFar);
}

FASTNET_INLINE void outputs_of_points(const Vec<float> (&m)[kHalfSide], Vec<float> (&y)[2]) {
  y[0] = m[0] + (m[1] + m[2]);
  y[1] = m[3] + (m[1] - m[2]) * kNear;
}

// The first half of a transform: half = transform(column), column by column, of kIn elements each
// that load_at(row, column) gives.
template <int kIn, int kOutputs, int kColumns, class Load, class Transform>
FASTNET_INLINE void transform_columns(const Load& load_at, const Transform& transform,
                                      Vec<float> (&half)[kOutputs][kColumns]) {
  Vec<float> column[kIn], result[kOutputs];
#pragma GCC unroll 1
  for (int j = 0; j < kColumns; ++j) {
    FASTNET_UNROLL for (int i = 0; i < kIn; ++i) column[i] = load_at(i, j);
    transform(column, result);
    FASTNET_UNROLL for (int i = 0; i < kOutputs; ++i) half[i][j] = result[i];
  }
}
// The same of a tile's points, in planes.
template <int kRows, int kOutputs, int kColumns, class Transform>
FASTNET_INLINE void transform_points(const float* from, int64_t plane, const Transform& transform,
                                     Vec<float> (&half)[kOutputs][kColumns]) {
  const auto load_at = [&](int i, int j) __attribute__((always_inline)) {
    return load(from + (point_of<kRows>(i) * kSide + point_of<kColumns>(j)) * plane);
  };
  transform_columns<kRows>(load_at, transform, half);
}

// V of one vector of channels of a tile, columns first, then rows.
template <int kRows, int kColumns>
__attribute__((noinline)) static void transform_tile(const float* strip, int64_t row, float* to,
                                                     int64_t plane) {
  using V = Vec<float>;
  constexpr int kStep = kLanes<float>;
  V half[kRows][kColumns], v[kColumns];
  const auto load_at = [&](int i, int j) __attribute__((always_inline)) {
    return load(strip + i * row + j * kStep);
  };
  const auto points = [](const V(&d)[kRows], V(&v)[kRows])
                          __attribute__((always_inline)) { points_of_patch(d, v); };
  transform_columns<kRows>(load_at, points, half);
#pragma GCC unroll 1
  for (int i = 0; i < kRows; ++i) {
    points_of_patch(half[i], v);
    float* const to_row = to + point_of<kRows>(i) * kSide * plane;
    FASTNET_UNROLL for (int j = 0; j < kColumns; ++j) {
      store(to_row + point_of<kColumns>(j) * plane, v[j]);
    }
  }
}

// U of filters whose lanes are `count` outputs, or inputs, `next_lane` apart, and each of which has
// `inner` of the other, `next_inner` apart: to[point][inner][lanes]. Returns their magnitude.
template <int kKernel, class T>
static Magnitude transform_filters(const T* weight, int64_t count, int64_t next_lane, int64_t inner,
                                   int64_t next_inner, Strides4 at, float* to) {
  using V = Vec<float>;
  constexpr int kStep = kLanes<float>;
  const int64_t plane = inner * kStep;
  alignas(64) float taps[kKernel * kKernel * kStep] = {};
  LargestOf<float> largest;
  for (int64_t i = 0; i < inner; ++i) {
    for (int64_t lane = 0; lane < count; ++lane) {
      const T* const from = weight + lane * next_lane + i * next_inner;
      for (int r = 0; r < kKernel; ++r) {
        for (int s = 0; s < kKernel; ++s) {
          taps[(r * kKernel + s) * kStep + lane] = widen(from[r * at.y + s * at.x]);
        }
      }
    }
    largest.add_all(taps, kKernel * kKernel * kStep);
    V half[kSide][kKernel], u[kSide];
    FASTNET_UNROLL for (int s = 0; s < kKernel; ++s) {
      V g[kKernel];
      FASTNET_UNROLL for (int r = 0; r < kKernel; ++r) g[r] =
          load(taps + (r * kKernel + s) * kStep);
      points_of_filter(g, u);
      FASTNET_UNROLL for (int y = 0; y < kSide; ++y) half[y][s] = u[y];
    }
    for (int y = 0; y < kSide; ++y) {
      points_of_filter(half[y], u);
      FASTNET_UNROLL for (int x = 0; x < kSide; ++x) {
        store(to + (y * kSide + x) * plane + i * kStep, u[x]);
      }
    }
  }
  return largest.magnitude(kLargestOfMany);
}
