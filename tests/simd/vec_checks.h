// Every function of csrc/simd/vec.h against scalar arithmetic, compiled once per target.
namespace {

template <class F>
void lanes(const char* what, Vec got, F wanted) {
  for (int k = 0; k < kLanes; ++k) expect(same(got[k], wanted(k)), FASTKD_NAME, what, got[k], wanted(k));
}

Vec vector_of(const float* values, int64_t first, int64_t count) {
  Vec v{};
  for (int k = 0; k < kLanes; ++k) v[k] = values[(first + k) % count];
  return v;
}

constexpr float kSpecials[] = {
    0.0f, -0.0f, 1.0f, -1.0f, 2.5f, -3e38f, 3e38f, 1e-3f, -7.0f, kInfinity, -kInfinity, __builtin_nanf(""), 0x1p-126f};

void check_selection() {
  constexpr int64_t count = sizeof kSpecials / sizeof *kSpecials;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < count; ++j) {
      const Vec a = vector_of(kSpecials, i, count), b = vector_of(kSpecials, j, count);
      lanes("max", max(a, b), [&](int k) { return a[k] > b[k] ? a[k] : b[k]; });
      lanes("min", min(a, b), [&](int k) { return a[k] < b[k] ? a[k] : b[k]; });
      lanes("select", select(a > b, a, b), [&](int k) { return a[k] > b[k] ? a[k] : b[k]; });
    }
}

void check_fma() {
  Vec a{}, b{}, c{};
  for (int round = 0; round < 64; ++round) {
    for (int k = 0; k < kLanes; ++k) {
      a[k] = 1.0f + 0x1p-20f * (float)(round * kLanes + k);
      b[k] = 1.0f - 0x1p-19f * (float)(round + k);
      c[k] = -a[k] * b[k];  // so that the product's rounding error is the whole result, or nothing
    }
#if defined(FASTKD_AVX512) || defined(FASTKD_AVX2) || defined(__aarch64__)
    lanes("fma", fma(a, b, c), [&](int k) { return std::fma(a[k], b[k], c[k]); });
#else
    lanes("fma", fma(a, b, c), [&](int) { return 0.0f; });
#endif
  }
}

void check_folds() {
  const auto larger = [](Vec a, Vec b) { return max(a, b); };
  const auto sum = [](Vec a, Vec b) { return a + b; };
  Vec rows[kLanes];
  for (int peak = 0; peak < kLanes; ++peak) {
    Vec v{};
    for (int k = 0; k < kLanes; ++k) v[k] = k == peak ? 100.0f + peak : (float)-k;
    rows[peak] = v;
    lanes("fold_lanes", fold_lanes(v, larger), [&](int) { return 100 + peak; });
    lanes("fold_lanes", fold_lanes(v, sum), [&](int) { return 100 + 2 * peak - kLanes * (kLanes - 1) / 2; });
  }
  lanes("fold_rows", fold_rows(rows, larger), [](int k) { return 100 + k; });
  lanes("fold_rows", fold_rows(rows, sum), [](int k) { return 100 + 2 * k - kLanes * (kLanes - 1) / 2; });
}

void check_lanes() {
  lanes("iota", iota(), [](int k) { return k; });
  lanes("lane_index", __builtin_convertvector(lane_index(), Vec), [](int k) { return k; });
  expect(!any(VecInt{}), FASTKD_NAME, "any of none", 1, 0);
  for (int k = 0; k < kLanes; ++k) {
    VecInt one{};
    one[k] = -1;
    expect(any(one), FASTKD_NAME, "any of one", 0, 1);
  }
  for (int64_t n = 0; n <= 3 * kLanes; ++n) {
    const int64_t wanted = n % kLanes ? n + kLanes - n % kLanes : n;
    expect(padded(n) == wanted, FASTKD_NAME, "padded", padded(n), wanted);
  }
}

void check_exp2() {
  for (float x = -126.0f; x <= 1.0f; x += 0x1.8p-9f) {
    const double got = exp2(splat(x))[kLanes - 1], wanted = std::exp2((double)x);
    expect(std::fabs(got - wanted) <= 1e-7 * wanted, FASTKD_NAME, "exp2", got, wanted);
  }
  for (int whole = -126; whole <= 1; ++whole)
    lanes("exp2 of an integer", exp2(splat((float)whole)), [&](int) { return std::ldexp(1.0, whole); });
  for (float x : {-126.6f, -127.0f, -200.0f, -3e38f, -kInfinity})
    lanes("exp2 of what underflows", exp2(splat(x)), [](int) { return 0.0; });
  lanes("exp2 of NaN", exp2(splat(__builtin_nanf(""))), [](int) { return NAN; });
}

void check_log() {
  for (uint32_t bits = 0x00800000; bits < 0x7f800000; bits += 0x3a7f1) {
    const double x = float_of(bits), got = log(splat((float)x))[0], wanted = std::log(x);
    const double unit = std::ldexp(1.0, std::ilogb((float)wanted) - 23);
    expect(std::fabs(got - wanted) <= unit, FASTKD_NAME, "log", got, wanted);
  }
  for (uint32_t bits = 0x3f7ff000; bits < 0x3f801000; ++bits) {
    const double got = log(splat(float_of(bits)))[0], wanted = std::log((double)float_of(bits));
    const double unit = wanted == 0 ? 0.0 : std::ldexp(1.0, std::ilogb((float)wanted) - 23);
    expect(std::fabs(got - wanted) <= unit, FASTKD_NAME, "log near 1", got, wanted);
  }
}

template <class T, class Decode>
void check_load(const char* what, Decode decode) {
  T values[kLanes];
  for (uint32_t bits = 0; bits < 0x10000; bits += kLanes) {
    for (int k = 0; k < kLanes; ++k) values[k].bits = (uint16_t)(bits + k);
    lanes(what, load(values), [&](int k) { return decode((uint16_t)(bits + k)); });
    expect(same(to_float(values[1]), decode((uint16_t)(bits + 1))), FASTKD_NAME, what, to_float(values[1]), 0);
  }
}

// Each value of the format, the middle to the next one, and one unit of float to either side of that.
template <class T, class Decode, class Round>
void check_store(const char* what, Decode decode, Round round) {
  T stored[kLanes];
  Vec v{};
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = (float)decode((uint16_t)bits), next = (float)decode((uint16_t)(bits + 1));
    const float middle = std::isinf(next) ? (float)(decode(bits) * 1.5 - decode(bits - 1) * 0.5) : value / 2 + next / 2;
    const float tried[] = {value, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 2 * middle)};
    for (int k = 0; k < kLanes; ++k) v[k] = tried[k % 4];
    store(stored, v);
    for (int k = 0; k < kLanes; ++k) {
      const double got = decode(stored[k].bits), wanted = round(v[k]);
      const bool sign = std::isnan(got) || std::signbit(got) == std::signbit(v[k]);
      expect(same(got, wanted) && sign, FASTKD_NAME, what, got, wanted);
    }
  }
}

// Whole and partial vectors of each dtype at an odd address, between guards that must survive.
template <class T>
void check_tails(const char* what) {
  T values[kLanes], source[kLanes + 1], target[kLanes + 2];
  Vec v{};
  for (int k = 0; k < kLanes; ++k) v[k] = (float)(k + 1);
  store(values, v);
  std::memcpy(source + 1, values, sizeof values);
  lanes(what, load(source + 1), [](int k) { return k + 1; });
  for (int64_t n = 0; n < kLanes; ++n) {
    lanes(what, load_tail(source + 1, n), [&](int k) { return k < n ? (float)(k + 1) : -kInfinity; });
    std::memset((void*)target, 0x42, sizeof target);
    T guard = target[0];
    store_tail(target + 1, v, n);
    for (int k = 0; k < kLanes + 2; ++k) {
      const float wanted = k >= 1 && k <= n ? (float)k : to_float(guard);
      expect(to_float(target[k]) == wanted, FASTKD_NAME, what, to_float(target[k]), wanted);
    }
  }
}

template <class T>
void check_strides(const char* what) {
  constexpr int kWidest = 19;
  T values[kWidest * kLanes];
  for (int i = 0; i < kWidest; ++i) store(values + i * kLanes, iota() * 0.5f + (float)(i * 8));
  for (int64_t stride : {0, 1, 2, 7, 18})
    for (int64_t n = 1; n <= kLanes; ++n)
      lanes(what, load_strided(values, stride, n), [&](int k) { return to_float(values[k < n ? k * stride : 0]); });
}

}  // namespace

static void check() {
  check_selection();
  check_fma();
  check_folds();
  check_lanes();
  check_exp2();
  check_log();
  check_load<BFloat16>("load bfloat16", decode_bfloat16);
  check_load<Half>("load float16", decode_half);
  check_store<BFloat16>("store bfloat16", decode_bfloat16, rounded_to_bfloat16);
  check_store<Half>("store float16", decode_half, rounded_to_half);
  check_tails<float>("float32 tails");
  check_tails<BFloat16>("bfloat16 tails");
  check_tails<Half>("float16 tails");
  check_strides<float>("float32 strides");
  check_strides<BFloat16>("bfloat16 strides");
  check_strides<Half>("float16 strides");
}
