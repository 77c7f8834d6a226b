// Lists of where a patch stands and its gradient, as conv_relu_pool's backward makes them and sums
// over them, and where they stand in memory. No include guard, like the other files of kernels.

// The sums of a list stay in registers, up to so many.
inline constexpr int kSums = kRegisters == 32 ? 25 : 12;

// Windows whose lists are made together, at most.
inline constexpr int kMaxWindows = 256;

template <class A>
struct Entry {
  int32_t at;
  A gradient;
};

// Where everything stands in a thread's scratch memory, in elements.
template <class T>
struct BackwardPlan {
  using A = acc_t<T>;
  int64_t channels, blocks, vectors;
  int64_t height, width;           // of the part of the padded input that windows touch
  int64_t row;                     // from one row of the padded input to the next
  int64_t patch_row;               // the same in a patch of grad_weight and the filters
  int64_t patch;                   // elements of such a patch
  int64_t strip_rows, strip_size;  // rows of windows in a strip, and its elements, of a block
  int64_t strips;                  // in a list
  int64_t filters, windows;        // whose lists grad_input makes at a time
  int64_t input_at, bases_at, window_gradients_at, window_codes_at, entries_at, image_at, end;

  explicit BackwardPlan(const ConvBackward<T>& call) {
    constexpr int64_t kLane = kLanes<T>, kStripBytes = 16 * 1024, kSlack = 8 * kLane;
    constexpr int64_t kSize = sizeof(A);
    channels = call.C < kLane ? call.C : kLane;
    blocks = (call.C + kLane - 1) / kLane;
    vectors = (call.kernel * channels + kLane - 1) / kLane;
    height = 2 * call.P + call.kernel - 1;
    width = 2 * call.Q + call.kernel - 1;
    row = width * channels;
    patch_row = vectors * kLane;
    patch = call.kernel * patch_row;
    const int64_t most = kStripBytes / kSize;
    strip_rows = (most / row - call.kernel + 1) / 2;
    strip_rows = strip_rows < 1 ? 1 : strip_rows < call.P ? strip_rows : call.P;
    strip_size = (2 * strip_rows + call.kernel - 1) * row;
    strips = strip_rows == call.P && strip_size <= most ? most / strip_size : 1;
    // So many filters of a block stay in the first-level cache while windows go past them.
    constexpr int64_t kFilterBytes = 20 * 1024;
    const int64_t fit = kFilterBytes / (patch * kSize) + 1, parts = (call.K + fit - 1) / fit;
    filters = least(call.K, round_up((call.K + parts - 1) / parts, kLane));
    windows = (4096 + filters - 1) / filters;
    if (windows > kMaxWindows) windows = kMaxWindows;
    if (windows > call.P * call.Q) windows = call.P * call.Q;
    const int64_t listed = strips * strip_rows * call.Q, by_window = windows * 4 * filters;
    const int64_t entry = sizeof(Entry<A>) / kSize;
    constexpr int64_t kLine = 64 / kSize;
    const auto next_line = [&](int64_t at) { return (at + kSlack + kLine - 1) / kLine * kLine; };
    input_at = 0;
    bases_at = next_line(blocks * strips * strip_size);
    window_gradients_at = next_line(bases_at + listed);
    window_codes_at = next_line(window_gradients_at + windows * filters);
    entries_at = next_line(window_codes_at + windows * filters / kSize);
    image_at = next_line(entries_at + entry * ((listed > by_window ? listed : by_window) + kLane));
    end = image_at + (call.grad_input ? blocks * height * row + kSlack : 0);
  }
};

// ---------------------------------------------------------------------------------------------
// Sums over a list

// to[r][v] += Σ over entries of gradient · from[at + r · row][v]. Of the last vector of a row only
// the first `lanes` lanes are patch.
template <class A, int kRows, int kVectors>
FASTNET_INLINE void accumulate_rows(const Entry<A>* entries, int64_t count, const A* from,
                                    int64_t row, A* to, int64_t to_row, int64_t lanes) {
  using V = Vec<A>;
  constexpr int kStep = kVectorBytes / sizeof(A);
  // So few sums would wait for their own additions: two entries have sums each.
  constexpr int kAtOnce = kRows * kVectors <= kSums / 2 ? 2 : 1;
  V sum[kAtOnce][kRows][kVectors];
  FASTNET_UNROLL for (int e = 0; e < kAtOnce; ++e) {
    FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
      FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[e][r][v] = V{};
    }
  }
  const auto add = [&](const Entry<A>& entry, V(&sum)[kRows][kVectors])
                       __attribute__((always_inline)) {
                         const V gradient = splat(entry.gradient);
                         const A* patch = from + entry.at;
                         FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
                           FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
                             sum[r][v] += gradient * load(patch + r * row + v * kStep);
                           }
                         }
                       };
  int64_t i = 0;
  for (; i + kAtOnce <= count; i += kAtOnce) {
    FASTNET_UNROLL for (int e = 0; e < kAtOnce; ++e) add(entries[i + e], sum[e]);
  }
  if (i < count) add(entries[i], sum[0]);
  const auto is_patch = lane_index<A>() < splat(static_cast<A>(lanes));
  FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
    A* const at = to + r * to_row;
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
      V value = kAtOnce == 2 ? sum[0][r][v] + sum[kAtOnce - 1][r][v] : sum[0][r][v];
      if (v == kVectors - 1) value = is_patch ? value : V{};
      store(at + v * kStep, load(at + v * kStep) + value);
    }
  }
}

template <class A>
using Accumulate = void (*)(const Entry<A>*, int64_t, const A*, int64_t, A*, int64_t, int64_t);

template <class A, int kKernel, int kVectors>
static void accumulate(const Entry<A>* entries, int64_t count, const A* from, int64_t row, A* to,
                       int64_t to_row, int64_t lanes) {
  constexpr int kFit = kSums / kVectors, kRows = kFit < kKernel ? kFit : kKernel;
  constexpr int kRest = kKernel % kRows;
  int r = 0;
  for (; r + kRows <= kKernel; r += kRows) {
    accumulate_rows<A, kRows, kVectors>(entries, count, from + r * row, row, to + r * to_row,
                                        to_row, lanes);
  }
  if constexpr (kRest > 0) {
    accumulate_rows<A, kRest, kVectors>(entries, count, from + r * row, row, to + r * to_row,
                                        to_row, lanes);
  }
}

template <class A, int kKernel, int kVectors = kKernel>
static Accumulate<A> accumulate_for(int64_t vectors) {
  if constexpr (kVectors > 1) {
    if (vectors != kVectors) return accumulate_for<A, kKernel, kVectors - 1>(vectors);
  }
  return accumulate<A, kKernel, kVectors>;
}

// ---------------------------------------------------------------------------------------------
// Making them

// What is no code counts as dead: it must not become an address.
FASTNET_INLINE uint8_t code_at(const uint8_t* codes) {
  return *codes < kDead ? *codes : kDead;
}

// Writes the lanes that are wanted, and behind them what it likes, as far as a vector's entries
// reach. Returns where the next entry belongs.
template <int... kLane>
FASTNET_INLINE Entry<float>* store_entries(Vec<int32_t> is_wanted, Vec<int32_t> at,
                                           Vec<float> gradient, Entry<float>* to,
                                           LaneList<kLane...>) {
  constexpr int kCount = sizeof...(kLane), kHalf = kCount / 2;
  const int count = pick(is_wanted, &gradient, &at);
  const Vec<float> place = (Vec<float>)at;
  float* const first = reinterpret_cast<float*>(to);
  store(first, __builtin_shufflevector(place, gradient, (kLane / 2 + kLane % 2 * kCount)...));
  store(first + kCount,
        __builtin_shufflevector(place, gradient, (kHalf + kLane / 2 + kLane % 2 * kCount)...));
  return to + count;
}

// Appends the live ones of `count` windows of a filter, whose patches stand at bases[i] and further
// by offsets[code], which for code 3 is the sum of those for 1 and 2. What a dead window writes,
// the next one writes over.
template <class T>
FASTNET_INLINE Entry<acc_t<T>>* list_windows(const T* gradients, int64_t gradient_stride,
                                             const uint8_t* codes, int64_t code_stride,
                                             const int32_t* bases, int64_t count,
                                             const int32_t* offsets, Entry<acc_t<T>>* end) {
  int64_t i = 0;
  if constexpr (std::is_same_v<acc_t<T>, float> && kVectorBytes > 16) {
    using I = Vec<int32_t>;
    constexpr AllLanes<kLanes<T>> lanes{};
    for (; gradient_stride == 1 && code_stride == 1 && i + kLanes<T> <= count; i += kLanes<T>) {
      const I code = load_bytes(codes + i);
      const I at = load(bases + i) + ((-(code & 1) & offsets[1]) + (-(code >> 1) & offsets[2]));
      end = store_entries(code < kDead, at, load(gradients + i), end, lanes);
    }
  }
  for (; i < count; ++i) {
    const uint8_t code = code_at(codes + i * code_stride);
    *end = {bases[i] + offsets[code], widen(gradients[i * gradient_stride])};
    end += code != kDead;
  }
  return end;
}

// Lists the filters of a window whose position `code` won, `next` from one patch to the next.
// Returns how many.
template <class A>
FASTNET_INLINE int64_t list_filters(const A* gradients, const uint8_t* codes, uint8_t code,
                                    int64_t filters, int32_t next, Entry<A>* entries) {
  Entry<A>* end = entries;
  int64_t k = 0;
  if constexpr (std::is_same_v<A, float> && kVectorBytes > 16) {
    constexpr AllLanes<kLanes<A>> lanes{};
    for (; k + kLanes<A> <= filters; k += kLanes<A>) {
      const Vec<int32_t> at = (lane_index<int32_t>() + static_cast<int32_t>(k)) * next;
      end = store_entries(load_bytes(codes + k) == code, at, load(gradients + k), end, lanes);
    }
  }
  for (; k < filters; ++k) {
    *end = {static_cast<int32_t>(k) * next, gradients[k]};
    end += codes[k] == code;
  }
  return end - entries;
}

template <class A>
FASTNET_INLINE A sum_of_gradients(const Entry<A>* entries, int64_t count) {
  static_assert(sizeof(Entry<A>) == 2 * sizeof(A));  // every other lane is a gradient
  using V = Vec<A>;
  constexpr int kStep = kVectorBytes / sizeof(A);
  const V lane = lane_index<A>(), zero = {};
  auto is_gradient = zero != zero;
  FASTNET_UNROLL for (int i = 1; i < kStep; i += 2) is_gradient[i] = -1;
  const A* const from = reinterpret_cast<const A*>(entries);
  const int64_t elements = 2 * count, whole = elements / kStep * kStep;
  V sum = {};
  for (int64_t i = 0; i < whole; i += kStep) sum += is_gradient ? load(from + i) : zero;
  // What stands behind the last entry is there, but anything.
  const auto is_entry = is_gradient & (lane < splat(static_cast<A>(elements - whole)));
  return reduce_add<A>(sum + (is_entry ? load(from + whole) : zero));
}
