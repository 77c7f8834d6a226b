// Patches of the input, as the forward kernels and the backward ones of few channels take them. No
// include guard: both files are compiled once per instruction set.
//
//   strip   [C][rows][2][half]     some rows of a padded image, even columns and odd ones apart

FASTNET_INLINE int64_t round_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}
// A distance at which many stores in a row do not all fall into the same few sets of the cache, as
// they do a page apart: an odd number of lines.
template <class A>
FASTNET_INLINE constexpr int64_t off_pages(int64_t elements) {
  constexpr int64_t kLine = 64 / sizeof(A);
  return ((elements + kLine - 1) / kLine | 1) * kLine;
}

// Winograd's F(2x2, 3x3): the four convolution outputs of a tile, that is one pooling window, by 16
// multiplications instead of 36:
//   Y = Aᵀ (Σ_c U ⊙ V) A    U = G g Gᵀ of the filter g, V = Bᵀ d B of the patch d
//
//        | 1  0 -1  0 |        |  1   0   0 |         | 1  1  1  0 |
//   Bᵀ = | 0  1  1  0 |    G = | ½   ½   ½ |    Aᵀ = | 0  1 -1 -1 |
//        | 0 -1  1  0 |        | ½  -½   ½ |
//        | 0  1  0 -1 |        |  0   0   1 |
//
// Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015.
inline constexpr int kPoints = 16;

// Winograd's form adds up what later cancels: an element of this size leaves an error of 2e-3, also
// in outputs whose filters pass it over. Of what is larger, or not finite, the direct form is
// taken.
inline constexpr float kLargest = 1e4f;
// The same of patches of 6 x 6, where one of this size leaves an error of 4e-4. Among elements of
// its own size a larger one does no harm, up to where sums might overflow.
inline constexpr float kLargestOfMany = 256, kLargestOfLarge = 1e10f;

// The largest magnitude of some floats: as integers their bits are in the same order, with infinity
// and then NaN above all.
FASTNET_INLINE void raise_magnitude(Vec<int32_t>* largest, Vec<float> value) {
  const Vec<int32_t> bits = (Vec<int32_t>)value & 0x7fffffff;
  *largest = bits > *largest ? bits : *largest;
}
FASTNET_INLINE bool is_below(Vec<int32_t> largest, float limit) {
  int32_t bits;
  __builtin_memcpy(&bits, &limit, sizeof bits);
  bool is = true;
  for (int lane = 0; lane < kLanes<float>; ++lane) is &= largest[lane] <= bits;
  return is;
}

// Two vectors of neighbours, even columns and odd ones.
template <class V, int... kLane>
FASTNET_INLINE void deinterleave(V a, V b, V* even, V* odd, LaneList<kLane...>) {
  *even = __builtin_shufflevector(a, b, (2 * kLane)...);
  *odd = __builtin_shufflevector(a, b, (2 * kLane + 1)...);
}
template <class T>
FASTNET_INLINE void load_columns(const T* from, Vec<acc_t<T>>* even, Vec<acc_t<T>>* odd) {
  deinterleave(load(from), load(from + kLanes<T>), even, odd, AllLanes<kLanes<T>>{});
}

// Copies columns [0, columns) of a row, 2i to even[i], 2i + 1 to odd[i].
template <class T>
FASTNET_INLINE void split_columns(const T* from, int64_t stride, acc_t<T>* even, acc_t<T>* odd,
                                  int64_t columns) {
  const auto eight = [&](int64_t x) {
    const Vec4<acc_t<T>> a = load_4(from + x), b = load_4(from + x + 4);
    store_4(even + x / 2, __builtin_shufflevector(a, b, 0, 2, 4, 6));
    store_4(odd + x / 2, __builtin_shufflevector(a, b, 1, 3, 5, 7));
  };
  int64_t x = 0;
  if (stride == 1 && columns >= 8) {
    for (; x + 2 * kLanes<T> <= columns; x += 2 * kLanes<T>) {
      Vec<acc_t<T>> evens, odds;
      load_columns(from + x, &evens, &odds);
      store(even + x / 2, evens);
      store(odd + x / 2, odds);
    }
    for (; x + 8 <= columns; x += 8) eight(x);
    // The rest reaches back over columns already copied.
    if (x + 2 <= columns) eight((columns - 8) / 2 * 2);
    x = columns / 2 * 2;
  }
  for (; x + 2 <= columns; x += 2) {
    even[x / 2] = widen(from[x * stride]);
    odd[x / 2] = widen(from[(x + 1) * stride]);
  }
  if (x < columns) even[x / 2] = widen(from[x * stride]);
}

// Some rows of them, to rows 2 * half apart. A function of its own, in which all has a register.
template <class T>
__attribute__((noinline)) static void split_rows(const T* from, Strides4 at, int64_t rows,
                                                 int64_t columns, int64_t half, acc_t<T>* even,
                                                 acc_t<T>* odd) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (; rows > 0; --rows, from += at.y, even += 2 * half, odd += 2 * half) {
    // The next image's: what it lacks in the caches takes longer than copying what it has.
    for (int64_t x = 0; at.x == 1 && x < columns; x += kLine) __builtin_prefetch(from + at.n + x);
    split_columns(from, at.x, even, odd, columns);
  }
}

// Copies rows [row, row + rows) of image n, counted in the padded image, into a strip whose columns
// to the left and right of the image are 0 already, and whose channels, of whole lines, stand
// `plane` apart. Returns whether all are known to be small.
template <class T>
static bool fill_strip(const ConvCall<T>& call, int64_t half, int64_t plane, int64_t n, int64_t row,
                       int64_t rows, acc_t<T>* strip) {
  using A = acc_t<T>;
  const int64_t left = least(call.pad_x, 2 * half);
  const int64_t columns = least(call.W, 2 * half - left);
  const bool channels_last = call.input_at.c == 1 && call.C > 1;
  // Column x of the image is column x + left of the padded one.
  const int64_t first_even = (left + 1) / 2, first_odd = left / 2;
  // The image's own even columns are odd ones of the padded image where `left` is odd.
  A* const even = strip + (left % 2 ? half + first_odd : first_even);
  A* const odd = strip + (left % 2 ? first_even : half + first_odd);
  // The rows of the strip that are the image's.
  const Strides4 at = call.input_at;
  const int64_t first = row < call.pad_y ? least(rows, call.pad_y - row) : 0;
  const int64_t below = call.H + call.pad_y - row;
  const int64_t last = below < first ? first : least(rows, below);
  const T* const image = call.input + n * at.n + (row + first - call.pad_y) * at.y;
  for (int64_t c = 0; c < call.C; ++c) {
    A* const channel = strip + c * plane;
    for (int64_t i = 0; i < first * 2 * half; ++i) channel[i] = 0;
    for (int64_t i = last * 2 * half; i < rows * 2 * half; ++i) channel[i] = 0;
    const int64_t to = c * plane + first * 2 * half;
    if (!channels_last) {
      split_rows(image + c * at.c, at, last - first, columns, half, even + to, odd + to);
    }
  }
  for (int64_t y = first; channels_last && y < last; ++y) {
    const T* const from = image + (y - first) * at.y;
    transpose(from, 2 * at.x, even + y * 2 * half, plane, (columns + 1) / 2, call.C);
    transpose(from + at.x, 2 * at.x, odd + y * 2 * half, plane, columns / 2, call.C);
  }
  if constexpr (sizeof(A) == sizeof(float)) {
    constexpr int kStep = kLanes<float>;
    Vec<int32_t> largest[2] = {};
    const int64_t count = call.C * plane;  // whole lines
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(float))) {
      for (int j = 0; j < 64 / static_cast<int>(sizeof(float)) / kStep; ++j) {
        raise_magnitude(largest + j % 2, load(strip + i + j * kStep));
      }
    }
    return is_below(largest[0], kLargest) && is_below(largest[1], kLargest);
  }
  return false;
}

// Copies rows [row, row + rows) of image n, counted in the padded image, `width` columns wide, into
// blocks of channels:
//   blocks  [C / channels][rows][width][channels]
// `next_block` from one to the next. Channels that there are not are 0. Raises `largest`, where it
// is given, to the elements, which are in the first-level cache here, but not all of them later.
template <class T>
static void fill_blocks(const ConvCall<T>& call, int64_t n, int64_t row, int64_t rows,
                        int64_t width, int64_t channels, int64_t next_block, acc_t<T>* to,
                        Vec<int32_t>* largest = nullptr) {
  using A = acc_t<T>;
  const int64_t left = least(call.pad_x, width), columns = least(call.W, width - left);
  const auto clear = [&](A* line, int64_t count) {
    __builtin_memset(line, 0, static_cast<size_t>(count * channels) * sizeof(A));
  };
  for (int64_t c = 0; c < call.C; c += channels, to += next_block) {
    const int64_t count = least(channels, call.C - c);
    for (int64_t y = 0; y < rows; ++y) {
      const int64_t from_y = row + y - call.pad_y;
      A* const whole_line = to + y * width * channels;
      if (from_y < 0 || from_y >= call.H) {
        clear(whole_line, width);
        continue;
      }
      const T* from =
          call.input + n * call.input_at.n + c * call.input_at.c + from_y * call.input_at.y;
      A* const line = whole_line + left * channels;
      if (count < channels) {
        clear(whole_line, width);
      } else {
        clear(whole_line, left);
        clear(line + columns * channels, width - left - columns);
      }
      if (call.input_at.c == 1 && count == kLanes<T>) {
        for (int64_t x = 0; x < columns; ++x) {
          store(line + x * channels, load(from + x * call.input_at.x));
        }
      } else if (call.input_at.c == 1 && std::is_same_v<T, A>) {
        for (int64_t x = 0; x < columns; ++x) {
          __builtin_memcpy(line + x * channels, from + x * call.input_at.x,
                           static_cast<size_t>(count) * sizeof(T));
        }
      } else if (call.input_at.x == 1) {
        // The next channels': so many rows of so few elements are more than the processor foresees.
        for (int64_t i = 0; i < channels; ++i) {
          __builtin_prefetch(from + (channels + i) * call.input_at.c);
        }
        transpose(from, call.input_at.c, line, channels, count, columns);
      } else {
        for (int64_t x = 0; x < columns; ++x) {
          for (int64_t i = 0; i < count; ++i) {
            line[x * channels + i] = widen(from[i * call.input_at.c + x * call.input_at.x]);
          }
        }
      }
      if constexpr (std::is_same_v<A, float>) {
        if (!largest) continue;
        Vec<int32_t> row[2] = {*largest, *largest};  // in registers, and two that wait for a load
        const int64_t elements = columns * channels, step = 2 * kLanes<float>;
        int64_t i = 0;
        for (; i + step <= elements; i += step) {
          raise_magnitude(row, load(line + i));
          raise_magnitude(row + 1, load(line + i + kLanes<float>));
        }
        if (i < elements) raise_magnitude(row, load(line + i));
        *largest = row[0] > row[1] ? row[0] : row[1];
      }
    }
  }
}

// Column j of a patch in one row, for neighbouring tiles.
template <class A>
FASTNET_INLINE Vec<A> load_column(const A* row, int64_t half, int j) {
  return load(row + j % 2 * half + j / 2);
}

// V = Bᵀ d B of `count` neighbouring tiles, and some beyond, of a channel, kPlane from one point to
// the next. Of 32 registers a patch has 16; of 16 a row of V is made at a time, from the two rows
// of the patch that it needs. A function of its own, in which sixteen addresses of a known distance
// need none.
template <int64_t kPlane>
__attribute__((noinline)) static void transform_row(const float* strip, int64_t half, float* to,
                                                    int64_t count) {
  using V = Vec<float>;
  constexpr int kStep = kLanes<float>;
  for (int64_t at = 0; at < count; at += kStep, strip += kStep, to += kStep) {
    const auto row = [&](int i, V x0, V x1, V x2, V x3) __attribute__((always_inline)) {
      store(to + 4 * i * kPlane, x0 - x2);
      store(to + (4 * i + 1) * kPlane, x1 + x2);
      store(to + (4 * i + 2) * kPlane, x2 - x1);
      store(to + (4 * i + 3) * kPlane, x1 - x3);
    };
    V patch[4][4];
    if constexpr (kRegisters == 32) {
      const float* line = strip;
      FASTNET_UNROLL for (int i = 0; i < 4; ++i, line += 2 * half) {
        FASTNET_UNROLL for (int j = 0; j < 4; ++j) {
          patch[i][j] = in_register(load_column(line, half, j));
        }
      }
    }
    const auto d = [&](int i, int j) __attribute__((always_inline)) {
      return kRegisters == 32 ? patch[i][j] : load_column(strip + i * 2 * half, half, j);
    };
    row(0, d(0, 0) - d(2, 0), d(0, 1) - d(2, 1), d(0, 2) - d(2, 2), d(0, 3) - d(2, 3));
    row(1, d(1, 0) + d(2, 0), d(1, 1) + d(2, 1), d(1, 2) + d(2, 2), d(1, 3) + d(2, 3));
    row(2, d(2, 0) - d(1, 0), d(2, 1) - d(1, 1), d(2, 2) - d(1, 2), d(2, 3) - d(1, 3));
    row(3, d(1, 0) - d(3, 0), d(1, 1) - d(3, 1), d(1, 2) - d(3, 2), d(1, 3) - d(3, 3));
  }
}
