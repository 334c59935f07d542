// Products of packed weights with rows of activations, compiled once per target; see runtime/panels.h for the layout.
//
// A tile holds the sums of R rows and B panels in registers and adds up input by input, in one order whatever R and B:
// a row's result does not depend on the rows beside it.
namespace {

using runtime::kGroups;
using runtime::Panels;
using runtime::Precision;

constexpr int kPanel = kGroups * kLanes;

// Whether there is a variant with products of bytes in one instruction.
#if defined(FASTKD_AVX512)
constexpr bool kCanVnni = true;
#elif defined(FASTKD_AVX2)
constexpr bool kCanVnni = kAssemblesAvxVnni;
#else
constexpr bool kCanVnni = false;
#endif

// Whether bytes are multiplied less 128, with a sign, which is so in AVX2: such sums begin with what they will lack.
template <Precision P, bool kVnni>
constexpr bool kSigned = P == Precision::int8 && kLanes == 8 && !kVnni;

// R x 4 sums, the inputs of R rows and a weight must fit the registers: 32 of them, or 16. Signed bytes take a register
// more per row.
template <Precision P, bool kVnni>
constexpr int kTileRows = kRegisters == 32 ? 6 : (kSigned<P, kVnni> ? 2 : 3);

// f(panel, row, group) for all of a tile, unrolled.
template <int B, int R, class F>
inline __attribute__((always_inline)) void each(F f) {
#pragma GCC unroll 2
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) f(b, r, g);
}

inline VecInt load_int(const void* p) {
  VecInt v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec to_vec(VecInt x) { return __builtin_convertvector(x, Vec); }

// sum += products of the 4 unsigned bytes of x, or signed ones (kSigned), with the 4 signed bytes of w, per lane,
// exactly.
template <bool kVnni>
inline void add_products(VecInt& sum, VecInt x, VecInt w) {
#if defined(FASTKD_AVX512)
  if constexpr (kVnni) {
    // Not the intrinsic: GCC 12 then moves the sums through memory.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return;
  }
  const __m512i odd_x = _mm512_srli_epi16((__m512i)x, 8), even_x = _mm512_and_si512((__m512i)x, _mm512_set1_epi16(255));
  const __m512i odd_w = _mm512_srai_epi16((__m512i)w, 8),
                even_w = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)w, 8), 8);
  sum += (VecInt)_mm512_madd_epi16(odd_x, odd_w) + (VecInt)_mm512_madd_epi16(even_x, even_w);
#elif defined(FASTKD_AVX2)
  if constexpr (kVnni) {
    VecInt more = sum;  // a register's own: GCC 12 else keeps some tiles' sums in memory
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(more) : "x"(x), "x"(w));
    sum = more;
    return;
  }
  // The sign goes to the weight: two products of 128 by 127 at most are a 16-bit number.
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)x), _mm256_sign_epi8((__m256i)w, (__m256i)x));
  sum += (VecInt)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  for (int byte = 0; byte < 4; ++byte) sum += ((x >> (8 * byte)) & 255) * ((w << (24 - 8 * byte)) >> 24);
#endif
}

template <Precision P, bool kVnni, int R, int B>
struct Tile {
  static constexpr bool kInteger = P == Precision::int8;
  using Sum = std::conditional_t<kInteger, VecInt, Vec>;
  using Input = std::conditional_t<kInteger, uint8_t, float>;
  Sum sum[B][R][kGroups];

  // Nothing added up yet of panels `panel`... of w, but what signed bytes of x lack.
  inline __attribute__((always_inline)) Tile(const Panels& w, int64_t panel) {
    each<B, R>([&](int b, int r, int g) {
      sum[b][r][g] = Sum{};
      if constexpr (kSigned<P, kVnni>)
        sum[b][r][g] = __builtin_convertvector(128.0f * load(w.sum.data() + (panel + b) * kPanel + g * kLanes), VecInt);
    });
  }

  // Adds the products with x, of R rows, stride inputs apart.
  inline __attribute__((always_inline)) void add(const Panels& w, int64_t panel, const Input* x, int64_t stride) {
    const int64_t depth = w.depth(), bytes = w.panel_bytes();
    const char* at = w.weights.as() + panel * bytes;
    constexpr int64_t kStep = (P == Precision::bfloat16 ? 2 : 4) * kPanel;  // bytes per step
    for (int64_t k = 0; k < depth; ++k, at += kStep) {
      Sum input[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) input[r] = broadcast(x + r * stride, k);
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) {
          const Sum weight = read(at + b * bytes, g);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            if constexpr (kInteger)
              add_products<kVnni>(sum[b][r][g], input[r], weight);
            else
              sum[b][r][g] = fma(input[r], weight, sum[b][r][g]);
          }
        }
    }
  }

  // The weights of a group in a step.
  static inline Sum read(const char* at, int g) {
    constexpr int kBytes = 4 * kLanes;
    if constexpr (P == Precision::bfloat16) {
      at += g / 2 * kBytes;
      if (g % 2 == 0) return as_float(load_int(at) << 16);
      if constexpr (kRegisters == 16) __asm__("" : "+r"(at));  // read again: to keep it would take a register more
      return as_float(load_int(at));                           // with the other's bits below: the packing knows
    } else {
      Sum weight;
      std::memcpy(&weight, at + g * kBytes, sizeof weight);
      return weight;
    }
  }

  static inline Sum broadcast(const Input* x, int64_t k) {
    if constexpr (kInteger) {
      int32_t four;
      std::memcpy(&four, x + 4 * k, 4);
      if constexpr (kSigned<P, kVnni>) four ^= 0x80808080;
      return VecInt{} + four;
    } else {
      return splat(x[k]);
    }
  }
};

// Rows per tile of at most so many when so many are left: never a lone row after full tiles.
template <int kMost>
inline int64_t tile_rows(int64_t left) {
  return left <= kMost ? left : left < 2 * kMost ? (left + 1) / 2 : kMost;
}

// f(integral constant R) for a run-time count of 1 to kMost.
template <int kMost, class F>
inline void with_rows(int64_t rows, F f) {
  if (rows == kMost) return f(std::integral_constant<int, kMost>{});
  if constexpr (kMost > 1) with_rows<kMost - 1>(rows, f);
}

// A single row takes two panels at once: four sums alone would wait for one another.
inline int64_t panels_at_once(int64_t rows, int64_t left) { return rows == 1 && left >= 2 ? 2 : 1; }

// Rows of a layer's input: int8 has one scale per row, and 128 for zero.
struct Rows {
  const void* data;
  int64_t count, stride;
  const float* scale;
};

// y = W x + b for every row: put(row, panel, y of the four groups).
template <Precision P, bool kVnni, class F>
void multiply(const Panels& w, const Rows& x, F put) {
  constexpr int kMost = kTileRows<P, kVnni>;
  for (int64_t panel = 0, at_once; panel < w.panels; panel += at_once) {
    at_once = panels_at_once(x.count, w.panels - panel);
    for (int64_t row = 0, n; row < x.count; row += n) {
      n = tile_rows<kMost>(x.count - row);
      const auto run = [&](auto rows, auto panels) {
        constexpr int R = rows, B = panels;
        using T = Tile<P, kVnni, R, B>;
        T tile(w, panel);
        tile.add(w, panel, (const typename T::Input*)x.data + row * x.stride, x.stride);
        Vec y[B][R][kGroups];
        each<B, R>([&](int b, int r, int g) {
          const int64_t column = (panel + b) * kPanel + g * kLanes;
          const Vec bias = load(w.bias.data() + column);
          if constexpr (P == Precision::int8) {
            const Vec scale = load(w.scale.data() + column) * x.scale[row + r];
            y[b][r][g] = fma(to_vec(tile.sum[b][r][g]) - 128.0f * load(w.sum.data() + column), scale, bias);
          } else {
            y[b][r][g] = tile.sum[b][r][g] + bias;
          }
        });
        for (int b = 0; b < B; ++b)
          for (int r = 0; r < R; ++r) put(row + r, panel + b, y[b][r]);
      };
      if (at_once == 2)
        run(std::integral_constant<int, 1>{}, std::integral_constant<int, 2>{});
      else
        with_rows<kMost>(n, [&](auto rows) { run(rows, std::integral_constant<int, 1>{}); });
    }
  }
}

// The low byte of the first n lanes.
inline void store_bytes(uint8_t* to, VecInt bits, int64_t n) {
#if defined(FASTKD_AVX512)
  _mm512_mask_cvtepi32_storeu_epi8(to, n >= kLanes ? 0xffff : (1u << n) - 1, (__m512i)bits);
#else
#if defined(FASTKD_AVX2)
  if (n >= kLanes) {
    const __m256i first = _mm256_shuffle_epi8((__m256i)bits, _mm256_set1_epi32(0x0c080400));  // of each half
    const uint32_t low = _mm256_extract_epi32(first, 0), high = _mm256_extract_epi32(first, 4);
    std::memcpy(to, &low, 4);
    std::memcpy(to + 4, &high, 4);
    return;
  }
#endif
  for (int64_t j = 0; j < kLanes && j < n; ++j) to[j] = (uint8_t)bits[j];
#endif
}

// round(127 x) + 128 with x in [-1, 1], in the low byte: 1.5 * 2^23 leaves the rounded value in a sum's last bits.
inline VecInt to_byte(Vec x) { return as_int(fma(x, splat(127.0f), splat(12582912.0f + 128))); }

// to = round(x / scale) + 128 with scale = max |x| / 127, and 128 up to the next multiple of 4. Returns scale.
inline float quantize(const float* x, int64_t n, uint8_t* to) {
  const int64_t whole = n / kLanes * kLanes, bytes = (n + 3) / 4 * 4;
  float rest[kLanes] = {};
  std::memcpy(rest, x + whole, (n - whole) * sizeof(float));
  const auto size = [](Vec v) { return max(v, -v); };
  Vec most = size(load(rest));
  for (int64_t k = 0; k < whole; k += kLanes) most = max(size(load(x + k)), most);
  const float largest = fold_lanes(most, [](Vec a, Vec b) { return max(a, b); })[0];
  const Vec inverse = splat(largest > 0 ? 1 / largest : 1.0f);
  for (int64_t k = 0; k < bytes; k += kLanes) {
    const Vec v = k < whole ? load(x + k) : load(rest);
    store_bytes(to + k, to_byte(v * inverse), bytes - k);
  }
  return largest > 0 ? largest / 127 : 1;
}

}  // namespace
