// Transposing. No include guard: simd.h includes this once per instruction set.

// Four elements of kVectorBytes / 16 places, `next` apart, side by side in one vector, and back.
template <int kBytes = kVectorBytes>
FASTNET_INLINE typename VectorType<float, kBytes>::type load_fours(const float* from,
                                                                   int64_t next) {
  if constexpr (kBytes == 16) {
    return load_4(from);
  } else {
    constexpr AllLanes<kBytes / 4> lanes{};
    return join(load_fours<kBytes / 2>(from, next),
                load_fours<kBytes / 2>(from + kBytes / 32 * next, next), lanes);
  }
}
template <int kBytes = kVectorBytes>
FASTNET_INLINE void store_fours(float* to, int64_t next,
                                typename VectorType<float, kBytes>::type value) {
  if constexpr (kBytes == 16) {
    store_4(to, value);
  } else {
    constexpr AllLanes<kBytes / 8> lanes{};
    store_fours<kBytes / 2>(to, next, lower_half(value, lanes));
    store_fours<kBytes / 2>(to + kBytes / 32 * next, next, upper_half(value, lanes));
  }
}

// Four vectors of 4 x 4 elements each per 16 bytes, of which every 4 x 4 is transposed.
template <class V, int... kLane>
FASTNET_INLINE void transpose_fours(V (&x)[4], LaneList<kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const auto interleave = [](V a, V b, auto first) {
    constexpr int kFirst = decltype(first)::value;
    return __builtin_shufflevector(
        a, b, (kLane / 4 * 4 + kFirst + kLane % 4 / 2 + kLane % 2 * kCount)...);
  };
  const auto join_pairs = [](V a, V b, auto first) {
    constexpr int kFirst = decltype(first)::value;
    return __builtin_shufflevector(
        a, b, (kLane / 4 * 4 + kFirst + kLane % 2 + kLane % 4 / 2 * kCount)...);
  };
  using Low = std::integral_constant<int, 0>;
  using High = std::integral_constant<int, 2>;
  const V ab_low = interleave(x[0], x[1], Low{}), ab_high = interleave(x[0], x[1], High{});
  const V cd_low = interleave(x[2], x[3], Low{}), cd_high = interleave(x[2], x[3], High{});
  x[0] = join_pairs(ab_low, cd_low, Low{});
  x[1] = join_pairs(ab_low, cd_low, High{});
  x[2] = join_pairs(ab_high, cd_high, Low{});
  x[3] = join_pairs(ab_high, cd_high, High{});
}

// to[column · to_row + row] = from[row · from_row + column]. Four columns of as many rows as a
// vector has lanes at a time, or four rows of as many columns, or four of four. The last four reach
// back over what is done already.
template <class From, class To>
FASTNET_INLINE void transpose(const From* from, int64_t from_row, To* to, int64_t to_row,
                              int64_t rows, int64_t columns) {
  using V = Vec4<acc_t<From>>;
  constexpr bool kByVectors =
      std::is_same_v<From, float> && std::is_same_v<To, float> && kVectorBytes > 16;
  constexpr int kStep = kLanes<float>;
  constexpr AllLanes<kStep> lanes{};
  constexpr AllLanes<4> four{};
  if (rows < 4 || columns < 4) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        narrow(widen(from[row * from_row + column]), to + column * to_row + row);
      }
    }
    return;
  }
  const auto last_four = [](int64_t index, int64_t count) {
    return index < count - 4 ? index : count - 4;
  };
  int64_t row = 0;
  if constexpr (kByVectors) {
    for (; row + kStep <= rows; row += kStep) {
      for (int64_t column = 0; column < columns; column += 4) {
        const int64_t at = last_four(column, columns);
        const float* const x = from + row * from_row + at;
        float* const y = to + at * to_row + row;
        Vec<float> block[4];
        FASTNET_UNROLL for (int i = 0; i < 4; ++i) {
          block[i] = load_fours(x + i * from_row, 4 * from_row);
        }
        transpose_fours(block, lanes);
        FASTNET_UNROLL for (int i = 0; i < 4; ++i) store(y + i * to_row, block[i]);
      }
    }
  }
  for (; row < rows; row += 4) {
    const From* const x = from + last_four(row, rows) * from_row;
    To* const y = to + last_four(row, rows);
    int64_t column = 0;
    if constexpr (kByVectors) {
      for (; column + kStep <= columns; column += kStep) {
        Vec<float> block[4];
        FASTNET_UNROLL for (int i = 0; i < 4; ++i) block[i] = load(x + i * from_row + column);
        transpose_fours(block, lanes);
        FASTNET_UNROLL for (int i = 0; i < 4; ++i) {
          store_fours(y + (column + i) * to_row, 4 * to_row, block[i]);
        }
      }
    }
    for (; column < columns; column += 4) {
      const int64_t at = last_four(column, columns);
      V block[4];
      FASTNET_UNROLL for (int i = 0; i < 4; ++i) block[i] = load_4(x + i * from_row + at);
      transpose_fours(block, four);
      FASTNET_UNROLL for (int i = 0; i < 4; ++i) store_4(y + (at + i) * to_row, block[i]);
    }
  }
}

// The same of bytes.
FASTNET_INLINE void transpose(const uint8_t* from, int64_t from_row, uint8_t* to, int64_t to_row,
                              int64_t rows, int64_t columns) {
  using Bytes = typename VectorType<uint8_t, 16>::type;
  using Pairs = typename VectorType<uint16_t, 16>::type;
  const auto at = [](const uint8_t* bytes) {
    return *reinterpret_cast<const typename VectorType<uint8_t, 16>::unaligned*>(bytes);
  };
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    const uint8_t* const x = from + row * from_row;
    uint8_t* const y = to + row;
    int64_t column = 0;
    for (; column + 16 <= columns; column += 16) {
      const Bytes a = at(x + column), b = at(x + from_row + column);
      const Bytes c = at(x + 2 * from_row + column), d = at(x + 3 * from_row + column);
      const auto four = [&](Bytes ab, Bytes cd, int64_t first) {
        const Pairs low = __builtin_shufflevector((Pairs)ab, (Pairs)cd, 0, 8, 1, 9, 2, 10, 3, 11);
        const Pairs high =
            __builtin_shufflevector((Pairs)ab, (Pairs)cd, 4, 12, 5, 13, 6, 14, 7, 15);
        for (int i = 0; i < 4; ++i) {
          const uint32_t one = ((Vec4<uint32_t>)low)[i], other = ((Vec4<uint32_t>)high)[i];
          __builtin_memcpy(y + (first + i) * to_row, &one, 4);
          __builtin_memcpy(y + (first + 4 + i) * to_row, &other, 4);
        }
      };
      four(__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
           __builtin_shufflevector(c, d, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
           column);
      four(__builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31),
           __builtin_shufflevector(c, d, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31),
           column + 8);
    }
    for (; column < columns; ++column) {
      for (int i = 0; i < 4; ++i) y[column * to_row + i] = x[i * from_row + column];
    }
  }
  for (; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      to[column * to_row + row] = from[row * from_row + column];
    }
  }
}
