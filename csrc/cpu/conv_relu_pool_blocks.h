// Blocks of tiles, which all forms of conv_relu_pool's forward go by but that of patches of 6 x 6.
// Included by conv_relu_pool_forward_kernels.h.
//
// A tile is what one pooled output needs: a patch of kernel + 1 by kernel + 1 of the padded input,
// of every channel. Tiles are counted through images, rows and columns, and calculated in blocks,
// whose vectors have one tile to a lane: no lane is idle where a row ends.
//
//   patches [positions][C][tiles]  the tiles of a block, by position in the patch
//           [C][points][tiles]     or transformed: of very few channels, in Winograd's form
//   pooled  [K][tiles]             the block's results, then written in the output's layout

// Vectors of tiles in a block, at most.
inline constexpr int kMaxVectors = 32;
// Of very few channels kFusedFilters filters go past kProductVectors vectors at a time, up to
// kFusedVectors in a block. Filters stand in groups of kProductFilters, tiles in rows of kFusedRow.
inline constexpr int kProductFilters = 4, kFusedFilters = kRegisters == 32 ? 4 : 2,
                     kProductVectors = 3;
inline constexpr int kFusedVectors = 2 * kProductVectors;
inline constexpr int64_t kFusedRow = (kFusedVectors + 1) * kLanes<float>;
inline constexpr int kDirectFilters = kRegisters == 32 ? 6 : 3;
// Of one channel, from one point of the patches to the next.
inline constexpr int64_t kOneChannelPlane = off_pages<float>((kMaxVectors + 1) * kLanes<float>);

// Filters of the direct form stand in groups of kDirectFilters or one less.
struct FilterGroups {
  int64_t K, count;
  explicit FilterGroups(int64_t K) : K(K), count((K + kDirectFilters - 1) / kDirectFilters) {}
  int64_t begin(int64_t group) const { return group * K / count; }
};

// ---------------------------------------------------------------------------------------------
// Filters, shared out

template <class T>
static bool is_by_patches(const ConvForward<T>& call) {
  return call.form == ConvForm::patches_of_4;
}
template <class T>
static bool is_fused(const ConvForward<T>& call) {
  return is_by_patches(call) && call.C > 1;
}
template <class T>
static bool is_one_channel(const ConvForward<T>& call) {
  return is_by_patches(call) && call.C == 1;
}

// Filters are shared out in parts: of a vector of filters, kProductFilters, or a group.
template <class T>
int64_t filter_parts(const ConvForward<T>& call) {
  if (call.form == ConvForm::patches_of_6) return round_up(call.K, kLanes<T>) / kLanes<T>;
  return is_by_patches(call) ? round_up(call.K, kProductFilters) / kProductFilters
                             : FilterGroups(call.K).count;
}
template <class T>
static int64_t part_begin(const ConvForward<T>& call, int64_t part) {
  if (call.form == ConvForm::patches_of_6) return least(call.K, part * kLanes<T>);
  return is_by_patches(call) ? least(call.K, part * kProductFilters)
                             : FilterGroups(call.K).begin(part);
}

// How many are rearranged, and go past the input, at a time.
template <class T>
int64_t filter_parts_at_once(const ConvForward<T>& call) {
  const int64_t parts = filter_parts(call);
  if (call.form != ConvForm::patches_of_6) return parts;
  const int64_t fit = most_filters<acc_t<T>>() / (kSidePoints * kLanes<T> * call.C);
  const int64_t vectors = fit / kVectorsAtOnce * kVectorsAtOnce;
  return least(parts, vectors < kVectorsAtOnce ? kVectorsAtOnce : vectors);
}
// What they take, in elements.
template <class T>
int64_t filter_count(const ConvForward<T>& call) {
  if (call.form == ConvForm::patches_of_6) {
    return kSidePoints * kLanes<T> * call.C * filter_parts_at_once(call);
  }
  return is_by_patches(call) ? kPoints * round_up(call.K, kProductFilters) * call.C
                             : call.K * call.C * call.kernel * call.kernel;
}

// ---------------------------------------------------------------------------------------------
// Patches

// Where everything stands in a thread's scratch memory, in elements.
template <class T>
struct ForwardPlan {
  using A = acc_t<T>;
  int64_t half;         // the even columns of a row of a strip, or the odd ones
  int64_t strip_rows;   // of tiles, in a strip
  int64_t strip_plane;  // from one channel of a strip to the next
  int64_t tiles;        // in a block
  int64_t patch_row;    // from one channel of the patches to the next
  int64_t plane;        // from one point of the patches to the next
  int64_t strip_at, patches_at, pooled_at, codes_at, end;

  explicit ForwardPlan(const ConvForward<T>& call) {
    constexpr int64_t kStripBytes = 64 * 1024, kPatchBytes = 24 * 1024;
    constexpr int64_t kSize = sizeof(A);
    const int64_t C = call.C, points = (call.kernel + 1) * (call.kernel + 1);
    half = call.Q + call.kernel / 2;
    strip_rows = least(call.P, kStripBytes / (4 * C * half * kSize));
    if (strip_rows < 1) strip_rows = 1;
    // The more tiles, the longer the stretches in which the output is written; but their patches
    // are to stay in the cache.
    int64_t vectors = kPatchBytes / (points * C * kSize * kLanes<T>);
    vectors = least(vectors, (call.most_units + kLanes<T> - 1) / kLanes<T>);
    if (is_fused(call)) {
      vectors = least(vectors / kProductVectors * kProductVectors, kFusedVectors);
      if (vectors < kProductVectors) vectors = kProductVectors;
    }
    vectors = vectors < 1 ? 1 : least(vectors, kMaxVectors);
    tiles = vectors * kLanes<T>;
    // An image to itself needs no scratch memory between its results and the output: its last
    // vector reaches back over tiles that the one before has, too, which must not be many.
    const int64_t image = call.P * call.Q;
    if (is_one_channel(call) && image <= tiles && image >= 6 * kLanes<T>) tiles = image;
    // Patches are written a vector at a time, past the end of a row of tiles, and read so.
    constexpr int64_t kSlack = 4 * kLanes<T>, kLine = 64 / kSize;
    patch_row = is_fused(call) ? kPoints * kFusedRow : tiles + kLanes<T>;
    plane = is_fused(call)         ? kFusedRow
            : is_one_channel(call) ? kOneChannelPlane
                                   : off_pages<A>(C * patch_row);
    strip_plane = off_pages<A>((2 * strip_rows + call.kernel - 1) * 2 * half);
    strip_at = 0;
    patches_at = round_up(strip_at + C * strip_plane + kSlack, kLine);
    pooled_at = patches_at + round_up(is_fused(call) ? C * patch_row : points * plane, kLine);
    codes_at = pooled_at + call.K * tiles;
    end = codes_at + call.K * tiles / kSize + kSlack;
  }
};

template <class T>
int64_t forward_scratch(const ConvForward<T>& call) {
  if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
    if (call.form == ConvForm::patches_of_6) return TilesForwardPlan<T>(call).end;
  }
  return ForwardPlan<T>(call).end;
}

// What the strip in the scratch memory is.
struct Strip {
  int64_t id = -1;
  bool is_small = true;
};

// `count` neighbouring tiles, and some beyond, of a channel as they are, `plane` from one position
// to the next. A function of its own, or its many addresses are made ready for transform_row, too.
template <class A, int kKernel>
__attribute__((noinline)) static void copy_row(const A* strip, int64_t half, A* to, int64_t plane,
                                               int64_t count) {
  constexpr int kPatch = kKernel + 1, kStep = kVectorBytes / sizeof(A);
  for (int64_t at = 0; at < count; at += kStep) {
    for (int r = 0; r < kPatch; ++r) {
      for (int s = 0; s < kPatch; ++s) {
        store(to + at + (r * kPatch + s) * plane, load_column(strip + at + r * 2 * half, half, s));
      }
    }
  }
}

// The patches of tiles [first, last) of a block, one row of tiles at a time. Returns whether all of
// them are small.
template <class T, int kKernel>
static bool gather_patches(const ConvForward<T>& call, const ForwardPlan<T>& plan, int64_t first,
                           int64_t last, Strip* at_hand, acc_t<T>* scratch) {
  using A = acc_t<T>;
  A* const strip = scratch + plan.strip_at;
  bool is_small = true;
  for (int64_t tile = first; tile < last;) {
    const int64_t n = tile / (call.P * call.Q), p = tile / call.Q % call.P, q = tile % call.Q;
    // As far as the strip goes, tiles lie in rows side by side.
    const int64_t strips = (call.P + plan.strip_rows - 1) / plan.strip_rows;
    const int64_t p_first = p / plan.strip_rows * plan.strip_rows;
    const int64_t p_rows = least(plan.strip_rows, call.P - p_first);
    const int64_t rows = 2 * p_rows + kKernel - 1;
    const int64_t id = n * strips + p / plan.strip_rows;
    if (id != at_hand->id) {
      *at_hand = {id, fill_strip(call, plan.half, plan.strip_plane, n, 2 * p_first, rows, strip)};
    }
    is_small &= at_hand->is_small;
    const int64_t stop = least(last, (n * call.P + p_first + p_rows) * call.Q);
    for (int64_t c = 0; c < call.C; ++c) {
      int64_t row = p - p_first, column = q;
      for (int64_t t = tile; t < stop;) {
        // What is written beyond the end of the row, the next row writes over.
        const int64_t count = least(stop - t, call.Q - column);
        const A* from = strip + c * plan.strip_plane + 2 * row * 2 * plan.half + column;
        A* to = scratch + plan.patches_at + c * plan.patch_row + (t - first);
        if constexpr (sizeof(A) == sizeof(float) && kKernel == 3) {
          if (is_fused(call)) transform_row<kFusedRow>(from, plan.half, to, count);
          if (is_one_channel(call)) transform_row<kOneChannelPlane>(from, plan.half, to, count);
        }
        if (call.form == ConvForm::direct) {
          copy_row<A, kKernel>(from, plan.half, to, plan.plane, count);
        }
        t += count;
        ++row;
        column = 0;
      }
    }
    tile = stop;
  }
  return is_small;
}

// ---------------------------------------------------------------------------------------------
// Results

// Where the results of a vector of tiles go, of which the first is tile `at` of the block: a
// filter's `next` elements after those of the one before.
template <class T>
struct Target {
  int64_t at;
  T* pooled;
  uint8_t* codes;
  int64_t next;
  int64_t run;  // how many vectors from this one on stand side by side
};

// Of a block's vectors: into the output where their tiles stand side by side there, else through
// the scratch memory.
template <class T>
struct Targets {
  Target<T> of[kMaxVectors];
  bool is_output[kMaxVectors];
  Targets(const ConvForward<T>& call, const ForwardPlan<T>& plan, int64_t first, int64_t last,
          acc_t<T>* scratch) {
    T* const pooled = reinterpret_cast<T*>(scratch + plan.pooled_at);
    uint8_t* const codes =
        call.codes ? reinterpret_cast<uint8_t*>(scratch + plan.codes_at) : nullptr;
    const int64_t image = call.P * call.Q;
    int64_t n = first / image, window = first % image;
    const bool is_image = plan.tiles == image;
    for (int64_t v = 0; v * kLanes<T> < plan.tiles; ++v) {
      int64_t at = v * kLanes<T>;
      if (is_image && at > image - kLanes<T>) at = window = image - kLanes<T>;
      const bool is_whole = window + kLanes<T> <= image && first + at + kLanes<T> <= last;
      const int64_t to = n * call.output_at.n + window;
      is_output[v] = call.output_at.x == 1 && is_whole;
      of[v] = is_output[v]
                  ? Target<T>{at, call.output + to, codes_at(call.codes, to), call.output_at.c, 1}
                  : Target<T>{at, pooled + at, codes_at(codes, at), plan.tiles, 1};
      for (window += kLanes<T>; window >= image; window -= image) ++n;
    }
    for (int64_t v = plan.tiles / kLanes<T> - 2; v >= 0; --v) {
      const Target<T>&one = of[v], &next = of[v + 1];
      const bool is_beside = is_output[v] && next.at == one.at + kLanes<T> &&
                             next.pooled == one.pooled + kLanes<T> && next.next == one.next;
      if (is_beside) of[v].run = next.run + 1;
    }
  }
};

// At most a vector of them.
template <class T>
FASTNET_INLINE void copy_few(const T* from, T* to, int64_t count) {
  constexpr int64_t kFour = 4;
  for (; count > 2 * kFour; count -= kFour, from += kFour, to += kFour) {
    __builtin_memcpy(to, from, kFour * sizeof(T));
  }
  if (count >= kFour) {
    __builtin_memcpy(to, from, kFour * sizeof(T));
    __builtin_memcpy(to + count - kFour, from + count - kFour, kFour * sizeof(T));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

// What of a block's results stands in the scratch memory, into the output: filters [k_begin, k_end)
// of tiles [first, last).
template <class T>
static void write_block(const ConvForward<T>& call, const ForwardPlan<T>& plan, int64_t first,
                        int64_t last, int64_t k_begin, int64_t k_end, const Targets<T>& targets,
                        const acc_t<T>* scratch) {
  const int64_t image = call.P * call.Q, tiles = plan.tiles;
  const T* const pooled = reinterpret_cast<const T*>(scratch + plan.pooled_at);
  const uint8_t* const codes = reinterpret_cast<const uint8_t*>(scratch + plan.codes_at);
  for (int64_t tile = first; tile < last;) {
    const int64_t in_vector = kLanes<T> - (tile - first) % kLanes<T>;
    if (targets.is_output[(tile - first) / kLanes<T>]) {
      tile += in_vector;
      continue;
    }
    const int64_t n = tile / image, window = tile % image;
    int64_t count = least(last - tile, image - window);
    if (call.output_at.x == 1) count = least(count, in_vector);
    const int64_t from = k_begin * tiles + (tile - first);
    const int64_t to =
        n * call.output_at.n + k_begin * call.output_at.c + window * call.output_at.x;
    if (call.output_at.x == 1) {  // the windows of a channel stand side by side; part of a vector
      for (int64_t k = 0; k < k_end - k_begin; ++k) {
        copy_few(pooled + from + k * tiles, call.output + to + k * call.output_at.c, count);
        if (!call.codes) continue;
        copy_few(codes + from + k * tiles, call.codes + to + k * call.output_at.c, count);
      }
    } else {  // channels_last
      transpose(pooled + from, tiles, call.output + to, call.output_at.x, k_end - k_begin, count);
      if (call.codes) {
        transpose(codes + from, tiles, call.codes + to, call.output_at.x, k_end - k_begin, count);
      }
    }
    tile += count;
  }
}
