// Matrix products whose sums are those of a narrow accumulator, with the bits of fpsim.reference.dot.
//
// Operands are float32 and accumulators are at most as wide, so that products, sums of two accumulators and everything
// that an aligned step keeps are exact in float64. A longer sum is rounded to odd first: rounding that to the
// accumulator is one correct rounding (Boldo and Melquiond, IEEE Transactions on Computers 57, 2008).
#include <ATen/cpu/vec/vec.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

using V = at::vec::Vectorized<double>;
using I = at::vec::Vectorized<int64_t>;
using F = at::vec::Vectorized<float>;
using Integers = at::vec::Vectorized<int32_t>;

constexpr int ROWS = 4;     // of a tile of the result
constexpr int VECTORS = 2;  // in a row of a tile
template <typename T>
constexpr int COLUMNS = VECTORS * at::vec::Vectorized<T>::size();

enum Order { SEQUENTIAL, CHUNKED, PAIRWISE, INTERLEAVED, ALIGNED, LATE };
enum Rounding { NEAREST_EVEN, NEAREST_AWAY, TOWARD_ZERO, UP, DOWN, TO_ODD, STOCHASTIC, STOCHASTIC_B, STOCHASTIC_C, CLAMP };

double from_bits(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint64_t to_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Arithmetic with subnormal numbers, whatever the process has set.
class Ieee {
 public:
#if defined(__SSE__)
  Ieee() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~Ieee() { _mm_setcsr(saved_); }
 private:
  unsigned saved_;
#elif defined(__aarch64__)
  Ieee() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ & ~(uint64_t(1) << 24)));
  }
  ~Ieee() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
 private:
  uint64_t saved_;
#endif
};

struct None {};  // changes nothing

#if defined(__SSE__)
// Arithmetic that rounds toward zero.
class TowardZero {
 public:
  TowardZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x6000u); }
  ~TowardZero() { _mm_setcsr(saved_); }
 private:
  unsigned saved_;
};
#endif

}  // namespace

// The fields of fpsim.accumulators.cpu.Specification, in the same order.
struct Specification {
  int64_t order, length, block, promote;       // how many products: in a step, in a block, before a promotion
  int64_t exact, round_products, flush;        // whether sums are exact in float64, ...
  int64_t bounded, cuts, narrow;               // whether sums stay in range, are cut, and are exact in float32
  int64_t short_products;                      // whether products have at most 24 bits, and `InFloat32` has the order
  int64_t rounding, mantissa_bits, random_bits, roundings, first_sum, key, nan_bits, lanes;
  int64_t scale_block, group;  // how many products share scales, and are added before they are aligned
  int64_t rescale;             // whether scales multiply the partial sums that are promoted, and not the elements
  int64_t first_element;       // the number of the result's first element, which random numbers depend on
  double start, smallest_normal, least_power, largest, infinite_from, overflow_up, overflow_down, infinity;
  double least_a, least_b, kept, floor, late_kept;
};

namespace {

struct Mask {
  static V sign() { return V(-0.0); }
  static V exponent() { return V(from_bits(0x7FF0000000000000u)); }
};

V magnitude(V x) { return x & V(from_bits(0x7FFFFFFFFFFFFFFFu)); }
V power(V x) { return x & Mask::exponent(); }  // 2 to the exponent of x; 0 for zero, infinity for infinities and NaN
template <typename T>
struct IntegerOf;
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <>
struct IntegerOf<float> {
  using type = int32_t;
};

// A power of two that is divided by others, without a division. All of them, and their quotients, are normal numbers.
template <typename T>
class PowerOfTwo {
 public:
  explicit PowerOfTwo(T value) {
    Integer bits, one;
    const T number(1);
    std::memcpy(&one, &number, sizeof one);
    std::memcpy(&bits, &value, sizeof bits);
    bits_ = at::vec::Vectorized<Integer>(bits + one);
  }
  at::vec::Vectorized<T> over(at::vec::Vectorized<T> power) const {
    return at::vec::cast<T>(bits_ - at::vec::cast<Integer>(power));
  }

 private:
  using Integer = typename IntegerOf<T>::type;
  at::vec::Vectorized<Integer> bits_;
};
V inverse(V power) { return PowerOfTwo<double>(1.0).over(power); }
// x. The compiler keeps it in a register, and does not load it for each of its uses.
V in_register(V x) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512d values = x;
  asm("" : "+v"(values));
  return values;
#elif defined(CPU_CAPABILITY_AVX2)
  __m256d values = x;
  asm("" : "+x"(values));
  return values;
#else
  return x;
#endif
}
V choose(V mask, V yes, V no) { return V::blendv(no, yes, mask); }

uint32_t random_word(uint64_t key, uint64_t index) {
  const uint32_t low = uint32_t(key) ^ uint32_t(index), high = uint32_t(key >> 32) ^ uint32_t(index >> 32);
  uint32_t word = low * 0xED5AD4BBu;
  word ^= word >> 15;
  word = (word ^ high) * 0xAC4C1B51u;
  word ^= word >> 14;
  word *= 0x31848BABu;
  return word ^ (word >> 17);
}

// The place of a vector of results and of a rounding: they determine its random numbers.
struct Place {
  int64_t element;  // of the first lane, in row-major order
  int64_t step;
};

// What a rounding has to expect: to nearest even, of numbers that cannot leave the range (infinities are absent); to
// nearest even; anything.
enum Mode { BOUNDED, NEAREST, GENERAL };

class Rounder {
 public:
  explicit Rounder(const Specification& spec)
      : spec_(spec),
        least_(spec.least_power),
        magic_(std::ldexp(1.5, int(52 - spec.mantissa_bits))),
        unit_(std::ldexp(1.0, -int(spec.mantissa_bits))) {}

  // x rounded to the accumulator.
  template <Mode MODE>
  V operator()(V x, Place place) const {
    if (MODE == BOUNDED) {
      const V magic = at::vec::clamp_min(power(x), least_) * magic_;
      return ((x + magic) - magic) | (x & Mask::sign());
    }
    if (MODE == GENERAL && spec_.rounding == CLAMP) return at::vec::clamp(x, V(spec_.overflow_down), V(spec_.largest));
    const V size = magnitude(x);
    const V p = at::vec::clamp_max(at::vec::clamp_min(power(x), least_), V(0x1p1000));
    const V magic = p * magic_;
    V r = (size + magic) - magic;
    if (MODE == GENERAL) r = directed(x, size, r, p * unit_, magic, place);
    if (spec_.smallest_normal > 0) r = choose(r < V(spec_.smallest_normal), V(0.0), r);
    const V overflow = MODE == NEAREST ? V(spec_.overflow_up)
                               : choose(x < V(0.0), V(spec_.overflow_down), V(spec_.overflow_up));
    r = choose(r > V(spec_.largest), overflow, r);
    r = choose(size >= V(spec_.infinite_from), V(spec_.infinity), r);
    return r | (x & Mask::sign());
  }

 private:
  // The magnitude in another rounding; `nearest` is the one to nearest even and `unit` the distance of neighbours.
  V directed(V x, V size, V nearest, V unit, V magic, Place place) const {
    const V below = nearest - (unit & (nearest > size));
    const V inexact = below < size;
    switch (spec_.rounding) {
      case NEAREST_AWAY:
        return below + (unit & (size - below >= unit * V(0.5)));
      case UP:
        return below + (unit & inexact & (x > V(0.0)));
      case DOWN:
        return below + (unit & inexact & (x < V(0.0)));
      case TO_ODD: {
        const V even = (below + (magic + magic)) - (magic + magic);
        return below + (unit & inexact & (even == below));
      }
      case STOCHASTIC:
      case STOCHASTIC_B:
      case STOCHASTIC_C: {
        double numbers[V::size()];
        for (int lane = 0; lane < V::size(); ++lane) {
          const uint64_t index = uint64_t((place.element + lane) * spec_.roundings + place.step);
          numbers[lane] = double(random_word(uint64_t(spec_.key), index) >> (32 - spec_.random_bits));
        }
        const double full = std::ldexp(1.0, int(spec_.random_bits));
        V scaled = (size - below) * (V(full) / unit);
        V needed = V(full) - V::loadu(numbers);
        if (spec_.rounding == STOCHASTIC) scaled = scaled.floor();
        if (spec_.rounding == STOCHASTIC_B) needed = needed - V(0.5);
        if (spec_.rounding == STOCHASTIC_C) scaled = (scaled + V(0x1.8p52)) - V(0x1.8p52);
        return below + (unit & inexact & (scaled >= needed));
      }
      default:
        return below;
    }
  }

  const Specification& spec_;
  V least_, magic_, unit_;
};

// s, which is inexact by `error`, rounded to odd: the neighbour on the side of the error if s is even.
V to_odd(V s, V error) {
  const V inexact = (error > V(0.0)) | (error < V(0.0));  // false for NaN
  const V even = at::vec::cast<double>((at::vec::cast<int64_t>(s) & I(1)) == I(0));
  const V outward = at::vec::cast<double>(at::vec::cast<int64_t>((s ^ error) & Mask::sign()) == I(0));
  const I step = at::vec::cast<int64_t>(inexact & even) & (at::vec::cast<int64_t>(outward & V(from_bits(2))) - I(1));
  return at::vec::cast<double>(at::vec::cast<int64_t>(s) + step);
}

V error_of_sum(V a, V b, V s) {
  const V t = s - a;
  return (a - (s - t)) + (b - t);
}

// a + b rounded to odd. A sum of zero is -0 in rounding down, unless both are +0: opposite numbers have both signs.
V add(V a, V b, bool exact, bool down) {
  V s = a + b;
  if (!exact) s = to_odd(s, error_of_sum(a, b, s));
  return down ? choose(s == V(0.0), (a | b) & Mask::sign(), s) : s;
}

// The exact sum of c and products, rounded to odd: a fixed-point number of all bits that products of float32 can have.
double exact_sum(double c, const double* a, int64_t stride_a, const double* b, int64_t stride_b, int64_t count) {
  constexpr int LIMBS = 24, LOWEST = -360;  // in units of 2**LOWEST, 32 bits in a limb
  int64_t limbs[LIMBS + 2] = {};
  auto accumulate = [&](double x) {
    if (x == 0) return;
    int exponent;
    const double fraction = std::frexp(x, &exponent);
    const int64_t mantissa = int64_t(std::ldexp(fraction, 53));
    const int position = exponent - 53 - LOWEST;
    const uint64_t size = uint64_t(mantissa < 0 ? -mantissa : mantissa);
    const unsigned __int128 wide = static_cast<unsigned __int128>(size) << (position % 32);
    const int64_t sign = mantissa < 0 ? -1 : 1;
    for (int i = 0; i < 3; ++i) limbs[position / 32 + i] += sign * int64_t(uint32_t(wide >> (32 * i)));
  };
  accumulate(c);
  for (int64_t k = 0; k < count; ++k) accumulate(a[k * stride_a] * b[k * stride_b]);
  auto normalize = [&] {
    for (int i = 0; i < LIMBS + 1; ++i) {
      const int64_t carry = limbs[i] >> 32;
      limbs[i] -= carry * (int64_t(1) << 32);
      limbs[i + 1] += carry;
    }
  };
  normalize();
  const bool negative = limbs[LIMBS + 1] < 0;
  if (negative) {
    for (auto& limb : limbs) limb = -limb;
    normalize();
  }
  int top = LIMBS + 1;
  while (top >= 0 && limbs[top] == 0) --top;
  if (top < 0) return 0.0;
  unsigned __int128 wide = 0;
  for (int i = 0; i < 3; ++i) wide = (wide << 32) | (top - i >= 0 ? uint64_t(limbs[top - i]) : 0);
  bool sticky = false;
  for (int i = top - 3; i >= 0; --i) sticky |= limbs[i] != 0;
  int bits = 0;
  while (wide >> bits) ++bits;
  const int dropped = std::max(bits - 53, 0);
  uint64_t kept = uint64_t(wide >> dropped);
  sticky |= (wide & ((static_cast<unsigned __int128>(1) << dropped) - 1)) != 0;
  kept |= sticky;
  const double result = std::ldexp(double(kept), dropped + 32 * (top - 2) + LOWEST);
  return negative ? -result : result;
}

// One tile of the result. The operands are packed, with the powers of two of their exponents (0 for a zero):
// a[k][ROWS] and b[k][COLUMNS].
template <typename T>
struct Packed {
  const T *a, *power_a, *b, *power_b;
  using Vec = at::vec::Vectorized<T>;

  Vec product(int64_t k, int r, int v) const { return Vec(a[k * ROWS + r]) * Vec::loadu(b + k * COLUMNS<T> + v * Vec::size()); }
  Vec product_power(int64_t k, int r, int v) const {
    return Vec(power_a[k * ROWS + r]) * Vec::loadu(power_b + k * COLUMNS<T> + v * Vec::size());
  }
};

// A matrix unit whose steps are exact in T: the accumulators and products are cut to `kept` below the largest power.
template <typename T, typename Round>
void aligned(const Specification& spec, const Packed<T>& tile, int64_t first, int64_t last,
             at::vec::Vectorized<T> (&c)[ROWS][VECTORS], const Round& round) {
  using Vec = at::vec::Vectorized<T>;
  const PowerOfTwo<T> kept(T(spec.kept));
  for (int64_t k = first; k < last; k += spec.length) {
    const int64_t end = std::min(k + spec.length, last);
    Vec top[ROWS][VECTORS], scale[ROWS][VECTORS], sum[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) top[r][v] = Vec(T(spec.floor));
    for (int64_t i = k; i < end; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) top[r][v] = at::vec::clamp_min(top[r][v], tile.product_power(i, r, v));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        top[r][v] = at::vec::clamp_min(top[r][v], round.power(c[r][v]));
        scale[r][v] = kept.over(top[r][v]);
        sum[r][v] = (c[r][v] * scale[r][v]).trunc();
      }
    for (int64_t i = k; i < end; i += spec.group)
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
          Vec term = tile.product(i, r, v);
          for (int64_t j = i + 1; j < std::min(i + spec.group, end); ++j) term = term + tile.product(j, r, v);
          sum[r][v] = sum[r][v] + (term * scale[r][v]).trunc();
        }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) c[r][v] = round(sum[r][v] * (top[r][v] * Vec(T(1 / spec.kept)))) + Vec(T(0));
  }
}

// Cuts the accumulators of a unit whose numbers are far from the ends of float32's range.
struct CutInFloat32 {
  at::vec::Vectorized<float> mask;
  explicit CutInFloat32(const Specification& spec) {
    const uint32_t bits = ~((1u << (23 - spec.mantissa_bits)) - 1);
    float x;
    std::memcpy(&x, &bits, sizeof x);
    mask = at::vec::Vectorized<float>(x);
  }
  at::vec::Vectorized<float> power(at::vec::Vectorized<float> x) const {
    using F = at::vec::Vectorized<float>;
    const F p = x & F(std::numeric_limits<float>::infinity());
    return F::blendv(p, F(1.0f), p > F(0x1p126f));
  }
  // NaN keeps its topmost bit of the mantissa.
  at::vec::Vectorized<float> operator()(at::vec::Vectorized<float> x) const { return x & mask; }
};

// Cuts the accumulators of a unit to float32 or another format whose largest binade is whole.
struct CutInFloat64 {
  V mask, least, unit, per_unit, infinite_from;
  explicit CutInFloat64(const Specification& spec)
      : mask(from_bits(~((uint64_t(1) << (52 - spec.mantissa_bits)) - 1))),
        least(spec.least_power),
        unit(std::ldexp(spec.least_power, -int(spec.mantissa_bits))),
        per_unit(1 / std::ldexp(spec.least_power, -int(spec.mantissa_bits))),
        infinite_from(spec.infinite_from) {}
  V power(V x) const {
    const V p = ::power(x);
    return choose(p > V(0x1p1000), V(1.0), at::vec::clamp_min(p, least & (x != V(0.0))));
  }
  V operator()(V x) const {
    const V size = magnitude(x);
    const V r = choose(size < least, (x * per_unit).trunc() * unit, x & mask);
    return choose(size >= infinite_from, V(std::numeric_limits<double>::infinity()) | (x & Mask::sign()), r);
  }
};

template <Mode MODE>
struct RoundInFloat64 {
  const Rounder& rounder;
  V least;
  V power(V x) const {
    const V p = ::power(x);
    return choose(p > V(0x1p1000), V(1.0), at::vec::clamp_min(p, least & (x != V(0.0))));
  }
  V operator()(V x) const { return rounder.template operator()<MODE>(x, {0, 0}); }
};

// CDNA 3: the sums of the products of one or two lanes, in units of their largest power over `kept`, and the sum so far
// are rounded down and added.
struct LateJoin {
  const Specification& spec;
  const Rounder& round;

  V operator()(const V (&tops)[2], const V (&sums)[2], V old) const {
    const V infinite(std::numeric_limits<double>::infinity());
    V top = tops[0], products = sums[0];
    if (spec.lanes == 2) {
      top = at::vec::clamp_min(top, tops[1]);
      products = (products * (tops[0] * inverse(top))).floor() + (sums[1] * (tops[1] * inverse(top))).floor();
    }
    const V own = finite_power(old), joined = at::vec::clamp_min(top, own);
    V kept = floor_to(old, PowerOfTwo<double>(spec.kept).over(joined));
    if (spec.lanes == 2) {
      const V lost = own * V(2 * spec.kept) < joined;
      kept = choose(lost & (magnitude(old) < infinite), V(0.0), kept);
    }
    const V x = floor_to(products * (top * V(1 / spec.kept)), PowerOfTwo<double>(2 * spec.late_kept).over(joined)) + kept;
    const V cut = floor_to(x, PowerOfTwo<double>(spec.late_kept).over(finite_power(x)));
    return round.template operator()<NEAREST>(choose(x == V(0.0), V(0.0), cut), {0, 0});
  }

 private:
  V finite_power(V x) const {
    const V p = at::vec::clamp_min(power(x), V(spec.least_power));
    return choose(p > V(0x1p1000), V(1.0), p);
  }

  // x rounded down to a multiple of 1 / scale, a power of two.
  static V floor_to(V x, V scale) { return (x * scale).floor() * inverse(scale); }
};

struct Tile : Packed<double> {
  const Specification& spec;
  const Rounder& rounder;
  int64_t element, row_length;  // of its first result, and of a row of results

  Tile(const Packed<double>& packed, const Specification& spec, const Rounder& rounder, int64_t element, int64_t row_length)
      : Packed<double>(packed), spec(spec), rounder(rounder), element(element), row_length(row_length) {}

  template <Mode MODE>
  V round(V x, int r, int v, int64_t step) const {
    return rounder.operator()<MODE>(x, {element + r * row_length + v * V::size(), step});
  }

  template <Mode MODE>
  V term(int64_t k, int r, int v) const {
    const V p = product(k, r, v);
    return spec.round_products ? round<MODE>(p, r, v, k) : p;
  }

  V sum(V x, V y) const { return add(x, y, spec.exact, spec.rounding == DOWN); }

  // All orders add the products first to last - 1 to c, which has the start value.
  template <Mode MODE>
  void accumulate(int64_t first, int64_t last, V (&c)[ROWS][VECTORS]) const {
    if (spec.block) return blocks<MODE>(first, last, c);
    switch (spec.order) {
      case SEQUENTIAL: return sequential<MODE>(first, last, c);
      case CHUNKED: return chunked<MODE>(first, last, c);
      case PAIRWISE: return pairwise<MODE>(first, last, c);
      case INTERLEAVED: return interleaved<MODE>(first, last, c);
      case LATE: return late(first, last, c);
      default: {
        if (MODE == GENERAL && spec.cuts) return aligned<double>(spec, *this, first, last, c, CutInFloat64(spec));
        return aligned<double>(spec, *this, first, last, c, RoundInFloat64<MODE>{rounder, V(spec.least_power)});
      }
    }
  }

  template <Mode MODE>
  void sequential(int64_t first, int64_t last, V (&c)[ROWS][VECTORS]) const {
    if (MODE != GENERAL && spec.exact && !spec.round_products) return sequential<MODE, true>(first, last, c);
    return sequential<MODE, false>(first, last, c);
  }

  template <Mode MODE, bool PLAIN>
  void sequential(int64_t first, int64_t last, V (&c)[ROWS][VECTORS]) const {
    V total[ROWS][VECTORS];
    copy(c, total);
    for (int64_t k = first; k < last; ++k) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
          const V s = PLAIN ? total[r][v] + product(k, r, v) : sum(total[r][v], term<MODE>(k, r, v));
          total[r][v] = round<MODE>(s, r, v, spec.first_sum + k);
        }
      }
    }
    copy(total, c);
  }

  static void copy(const V (&from)[ROWS][VECTORS], V (&to)[ROWS][VECTORS]) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) to[r][v] = from[r][v];
  }

  template <Mode MODE>
  void chunked(int64_t first, int64_t last, V (&c)[ROWS][VECTORS]) const {
    for (int64_t k = first; k < last; k += spec.length) {
      const int64_t end = std::min(k + spec.length, last);
      if (spec.exact && spec.rounding != DOWN) {
        V total[ROWS][VECTORS];
        copy(c, total);
        for (int64_t i = k; i < end; ++i) {
          V right[VECTORS];
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) right[v] = in_register(V::loadu(b + i * COLUMNS<double> + v * V::size()));
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) {
            const V left(a[i * ROWS + r]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) total[r][v] = at::vec::fmadd(left, right[v], total[r][v]);
          }
        }
        copy(total, c);
      } else {
        for (int r = 0; r < ROWS; ++r)
          for (int v = 0; v < VECTORS; ++v) c[r][v] = chunk(c[r][v], k, end, r, v);
      }
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) c[r][v] = round<MODE>(c[r][v], r, v, k / spec.length);
    }
  }

  // c and the products of one chunk, added exactly and rounded to odd.
  V chunk(V c, int64_t first, int64_t last, int r, int v) const {
    V s = c, errors(0.0), sizes(0.0), signs = c;
    for (int64_t k = first; k < last; ++k) {
      const V p = product(k, r, v), t = s + p, error = error_of_sum(s, p, t);
      s = t;
      errors = errors + error;
      sizes = sizes + magnitude(error);
      signs = signs | p;
    }
    const V high = s + errors, low = error_of_sum(s, errors, high);
    const V doubt = sizes * V(std::ldexp(double(last - first + 1), -52));
    const V plain = (sizes == V(0.0)) | (sizes != sizes);  // s is exact, or infinite or NaN
    const V sure = (magnitude(low) > doubt) | plain;
    V result = choose(plain, s, to_odd(high, low));
    double certain[V::size()];
    choose(sure, V(1.0), V(0.0)).store(certain);
    if (*std::min_element(certain, certain + V::size()) == 0.0) {
      double results[V::size()], starts[V::size()];
      result.store(results);
      c.store(starts);
      for (int lane = 0; lane < V::size(); ++lane)
        if (certain[lane] == 0.0)
          results[lane] = exact_sum(starts[lane], a + first * ROWS + r, ROWS,
                                    b + first * COLUMNS<double> + v * V::size() + lane, COLUMNS<double>, last - first);
      result = V::loadu(results);
    }
    return spec.rounding == DOWN ? choose(result == V(0.0), signs & Mask::sign(), result) : result;
  }

  // Neighbours are added, then their sums. A sum of 2**level products waits in `waiting` for its neighbour.
  template <Mode MODE>
  void pairwise(int64_t first, int64_t last, V (&c)[ROWS][VECTORS]) const {
    const int64_t count = last - first;
    int64_t steps[64];  // the number of the first rounding in every level
    steps[0] = spec.first_sum;
    for (int64_t level = 0, width = count; level < 63; ++level, width = (width + 1) / 2) steps[level + 1] = steps[level] + width / 2;
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < VECTORS; ++v) {
        V waiting[64];
        int levels[64], depth = 0;
        auto join = [&](V x, int64_t k) {
          const int level = levels[--depth];
          return round<MODE>(sum(waiting[depth], x), r, v, steps[level] + (k >> (level + 1)));
        };
        for (int64_t k = 0; k < count; ++k) {
          V x = term<MODE>(first + k, r, v);
          int level = 0;
          for (; k >> level & 1; ++level) x = join(x, k);
          waiting[depth] = x;
          levels[depth++] = level;
        }
        V x = waiting[--depth];
        while (depth) x = join(x, count - 1);
        c[r][v] = round<MODE>(x, r, v, spec.roundings - 1);
      }
    }
  }

  // Two lanes: the products at even and at odd places.
  template <Mode MODE>
  void interleaved(int64_t first, int64_t last, V (&c)[ROWS][VECTORS]) const {
    V lanes[2][ROWS][VECTORS];
    copy(c, lanes[0]);
    copy(c, lanes[1]);
    for (int64_t k = first; k < last; ++k) {
      auto& lane = lanes[(k - first) & 1];
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) lane[r][v] = round<MODE>(sum(lane[r][v], term<MODE>(k, r, v)), r, v, 0);
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) c[r][v] = round<MODE>(sum(lanes[0][r][v], lanes[1][r][v]), r, v, 0);
  }

  // The sums of blocks are added to c one after the other.
  template <Mode MODE>
  void blocks(int64_t first, int64_t last, V (&c)[ROWS][VECTORS]) const {
    for (int64_t k = first; k < last; k += spec.block) {
      V part[ROWS][VECTORS];
      for (auto& row : part) std::fill(row, row + VECTORS, V(spec.start));
      const int64_t end = std::min(k + spec.block, last);
      spec.order == PAIRWISE ? pairwise<MODE>(k, end, part) : interleaved<MODE>(k, end, part);
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) c[r][v] = round<MODE>(sum(c[r][v], part[r][v]), r, v, 0);
    }
  }

  // CDNA 3: the products are cut and added first.
  void late(int64_t first, int64_t last, V (&c)[ROWS][VECTORS]) const {
    const LateJoin join{spec, rounder};
    const PowerOfTwo<double> kept(spec.kept);
    const V limit(0x1p128), infinite(std::numeric_limits<double>::infinity());
    for (int64_t k = first; k < last; k += spec.length) {
      const int64_t end = std::min(k + spec.length, last);
      V tops[2][ROWS][VECTORS], sums[2][ROWS][VECTORS];
      for (int64_t lane = 0; lane < spec.lanes; ++lane) {
        V top[ROWS][VECTORS], scale[ROWS][VECTORS], sum[ROWS][VECTORS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) top[r][v] = V(spec.floor);
        for (int64_t i = k + lane; i < end; i += spec.lanes)
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) top[r][v] = at::vec::clamp_min(top[r][v], product_power(i, r, v));
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) {
            scale[r][v] = kept.over(top[r][v]);
            sum[r][v] = V(0.0);
          }
        for (int64_t i = k + lane; i < end; i += spec.lanes)
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) {
              const V p = product(i, r, v);
              sum[r][v] = sum[r][v] + choose(magnitude(p) >= limit, infinite | (p & Mask::sign()), (p * scale[r][v]).trunc());
            }
        copy(top, tops[lane]);
        copy(sum, sums[lane]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v)
          c[r][v] = join({tops[0][r][v], tops[1][r][v]}, {sums[0][r][v], sums[1][r][v]}, c[r][v]);
    }
  }
};

// The lanes of a vector of 32-bit numbers.
struct Halves {
  V low, high;
};

#if defined(CPU_CAPABILITY_AVX512)
Halves widen(F x) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
}
Halves widen(Integers x) {
  return {_mm512_cvtepi32_pd(_mm512_castsi512_si256(x)), _mm512_cvtepi32_pd(_mm512_extracti32x8_epi32(x, 1))};
}
// x, without the bits below the 24 most significant ones.
F cut_to_float(Integers x) { return _mm512_cvt_roundepi32_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
F narrowed(V low, V high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}
using Conversion = None;
#elif defined(CPU_CAPABILITY_AVX2)
Halves widen(F x) { return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))}; }
Halves widen(Integers x) {
  return {_mm256_cvtepi32_pd(_mm256_castsi256_si128(x)), _mm256_cvtepi32_pd(_mm256_extracti128_si256(x, 1))};
}
// While `Conversion` lives, float32 is cut, and the conversion too. The compiler keeps it between the changes of the mode.
F cut_to_float(Integers x) {
  __m256i integers = x;
  asm volatile("" : "+x"(integers));
  __m256 values = _mm256_cvtepi32_ps(integers);
  asm volatile("" : "+x"(values));
  return values;
}
F narrowed(V low, V high) { return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(low)), _mm256_cvtpd_ps(high), 1); }
using Conversion = TowardZero;
#else
template <typename T>
Halves widen(at::vec::Vectorized<T> x) {
  T narrow[F::size()];
  double wide[F::size()];
  x.store(narrow);
  for (int lane = 0; lane < F::size(); ++lane) wide[lane] = double(narrow[lane]);
  return {V::loadu(wide), V::loadu(wide + V::size())};
}

// x without the bits below the 24 most significant ones: the nearest number, or the one below it if that is larger.
F cut_to_float(Integers x) {
  const Integers size = x.abs();
  const F nearest = at::vec::convert_to_fp_of_same_size<float>(size);
  const Integers less = at::vec::convert_to_int_of_same_size(nearest) > size;  // -1 where it is larger
  return at::vec::cast<float>(at::vec::cast<int32_t>(nearest) + less) | (at::vec::cast<float>(x) & F(-0.0f));
}

F narrowed(V low, V high) {
  double wide[F::size()];
  float narrow[F::size()];
  low.store(wide);
  high.store(wide + V::size());
  for (int lane = 0; lane < F::size(); ++lane) narrow[lane] = float(wide[lane]);
  return F::loadu(narrow);
}
using Conversion = None;
#endif

// The function `LateJoin`, of numbers that are 0 or multiples of 2**-123, so that float32 rounds the sum. No sum is -0.
class LateJoinInFloat32 {
 public:
  explicit LateJoinInFloat32(const Specification& spec)
      : kept_(spec.kept),
        twice_kept_(float(2 * spec.kept)),
        top_(float(2 * spec.late_kept / spec.kept / spec.kept)),
        unit_(float(0.5 / spec.late_kept)),
        sum_(2 * spec.late_kept / spec.kept),
        fraction_(int64_t(((uint64_t(1) << 52) >> std::ilogb(spec.late_kept)) - 1)) {}

  F operator()(const F (&tops)[1], const Integers (&sums)[1], F old) const {
    return add(at::vec::clamp_min(tops[0], power(old)), tops[0], widen(sums[0]), old);
  }

  F operator()(const F (&tops)[2], const Integers (&sums)[2], F old) const {
    const F top = at::vec::clamp_min(tops[0], tops[1]), own = power(old), joined = at::vec::clamp_min(top, own);
    const Halves high = widen(top), first = widen(tops[0]), second = widen(tops[1]), x = widen(sums[0]), y = widen(sums[1]);
    const Halves products{lanes(high.low, first.low, x.low, second.low, y.low),
                          lanes(high.high, first.high, x.high, second.high, y.high)};
    return add(joined, top, products, F::blendv(old, F(0.0f), own * twice_kept_ < joined));
  }

 private:
  static F power(F x) { return x & F(std::numeric_limits<float>::infinity()); }

  static V lanes(V top, V first, V x, V second, V y) {
    const V scale = inverse(top);
    return (x * (first * scale)).floor() + (y * (second * scale)).floor();
  }

  // `products` are in units of top / kept.
  F add(F joined, F top, Halves products, F old) const {
    const Halves power = widen(joined), shift = widen(top * top_), before = widen(old);
    return narrowed(cut(power.low, shift.low, products.low, before.low), cut(power.high, shift.high, products.high, before.high)) *
           (joined * unit_);
  }

  // The sum in units of joined / (2 * late_kept), rounded down to the bits that the unit keeps of it.
  V cut(V joined, V shift, V products, V old) const {
    const V scale = kept_.over(joined);
    const V x = at::vec::fmadd((old * scale).floor(), sum_, (products * (shift * scale)).floor());
    const I negative = at::vec::cast<int64_t>(x < V(0.0));
    return at::vec::cast<double>((at::vec::cast<int64_t>(x) + (negative & fraction_)) & ~fraction_);
  }

  PowerOfTwo<double> kept_;
  F twice_kept_, top_, unit_;
  V sum_;
  I fraction_;
};

// A matrix unit whose products are normal numbers of float32, and exact there. They are multiples of 2**-123, as all of
// their sums are: none is subnormal.
struct InFloat32 : Packed<float> {
  static constexpr double LEAST_PRODUCT = 0x1p-100, LARGEST_PRODUCT = 0x1p100;
  const Specification& spec;
  F least;
  PowerOfTwo<float> kept;
  InFloat32(const Packed<float>& packed, const Specification& spec)
      : Packed<float>(packed), spec(spec), least(float(spec.floor < LEAST_PRODUCT ? LEAST_PRODUCT : spec.floor)), kept(float(spec.kept)) {}

  // The function `aligned`. A floor below every product has no effect.
  template <typename Round>
  void aligned(int64_t first, int64_t last, F (&c)[ROWS][VECTORS], const Round& round) const {
    for (int64_t k = first; k < last; k += spec.length) {
      const int64_t end = std::min(k + spec.length, last);
      F top[ROWS][VECTORS], scale[ROWS][VECTORS];
      Halves sum[ROWS][VECTORS];
      raise_all<false>(k, end, c, top, scale);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = widen((c[r][v] * scale[r][v]).trunc());
      add_kept(k, end, scale, sum);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
          const Halves unit = widen(top[r][v] * F(float(1 / spec.kept)));
          c[r][v] = narrowed(round(sum[r][v].low * unit.low) + V(0.0), round(sum[r][v].high * unit.high) + V(0.0));
        }
    }
  }

  // Whether int32 holds the sum of a step: products are below four times the largest power, and c is below twice it.
  static bool fits_int32(const Specification& spec) { return spec.cuts && spec.mantissa_bits == 23 && 4 * spec.length + 2 <= 0x1p31 / spec.kept; }

  // The same for an accumulator that float32 cuts, if `fits_int32`.
  void cut(int64_t first, int64_t last, F (&c)[ROWS][VECTORS]) const {
    const Conversion conversion;
    for (int64_t k = first; k < last; k += spec.length) {
      const int64_t end = std::min(k + spec.length, last);
      F top[ROWS][VECTORS], scale[ROWS][VECTORS];
      Integers sum[ROWS][VECTORS];
      raise_all<true>(k, end, c, top, scale);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = at::vec::convert_to_int_of_same_size(c[r][v] * scale[r][v]);
      add_integers(k, end, scale, sum);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) c[r][v] = cut_to_float(sum[r][v]) * (top[r][v] * F(float(1 / spec.kept)));
    }
  }

  // The function `Tile::late`, whose results float32 rounds.
  template <int LANES>
  void late(int64_t first, int64_t last, F (&c)[ROWS][VECTORS]) const {
    const LateJoinInFloat32 join(spec);
    for (int64_t k = first; k < last; k += spec.length) {
      const int64_t end = std::min(k + spec.length, last);
      F tops[ROWS][VECTORS][LANES], scale[ROWS][VECTORS];
      Integers sums[ROWS][VECTORS][LANES], sum[ROWS][VECTORS];
      for (int lane = 0; lane < LANES; ++lane) {
        F top[ROWS][VECTORS];
        for (auto& row : top) std::fill(row, row + VECTORS, least);
        raise(k + lane, end, top);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) {
            scale[r][v] = kept.over(top[r][v]);
            sum[r][v] = Integers(0);
          }
        add_integers(k + lane, end, scale, sum);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) {
            tops[r][v][lane] = top[r][v];
            sums[r][v][lane] = sum[r][v];
          }
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) c[r][v] = join(tops[r][v], sums[r][v], c[r][v]);
    }
  }

  // The function `Tile::blocks`, where float32 itself rounds as the unit does.
  void blocks(int64_t first, int64_t last, F (&c)[ROWS][VECTORS]) const {
    for (int64_t k = first; k < last; k += spec.block) {
      const int64_t end = std::min(k + spec.block, last);
      F part[ROWS][VECTORS];
      spec.order == PAIRWISE ? pairs(k, end, part) : interleaved(k, end, part);
      add(part, c);
    }
  }

 private:
  static void add(const F (&part)[ROWS][VECTORS], F (&sum)[ROWS][VECTORS]) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = sum[r][v] + part[r][v];
  }

  void add_product(int64_t k, F (&sum)[ROWS][VECTORS]) const {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = sum[r][v] + product(k, r, v);
  }

  // Two chains, of the products at even and at odd places.
  void interleaved(int64_t first, int64_t last, F (&part)[ROWS][VECTORS]) const {
    F odd[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) part[r][v] = odd[r][v] = F(0.0f);
    int64_t k = first;
    for (; k + 1 < last; k += 2) {
      add_product(k, part);
      add_product(k + 1, odd);
    }
    if (k < last) add_product(k, part);
    add(odd, part);
  }

  // Neighbours are added, then their sums: at most four products.
  void pairs(int64_t first, int64_t last, F (&part)[ROWS][VECTORS]) const {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        F sum = product(first, r, v);
        if (first + 1 < last) sum = sum + product(first + 1, r, v);
        if (first + 3 < last) sum = sum + (product(first + 2, r, v) + product(first + 3, r, v));
        else if (first + 2 < last) sum = sum + product(first + 2, r, v);
        part[r][v] = sum;
      }
  }

  // The largest power of the terms of a step, and what shifts them to integers. The sums so far are 0 or normal numbers if
  // they are IN_RANGE.
  template <bool IN_RANGE>
  C10_ALWAYS_INLINE void raise_all(int64_t first, int64_t last, const F (&c)[ROWS][VECTORS], F (&top)[ROWS][VECTORS], F (&scale)[ROWS][VECTORS]) const {
    const F least_power(float(spec.least_power));
    for (auto& row : top) std::fill(row, row + VECTORS, least);
    raise(first, last, top);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        const F x = c[r][v], p = x & F(std::numeric_limits<float>::infinity());
        const F own = IN_RANGE ? p : F::blendv(at::vec::clamp_min(p, least_power & (x != F(0.0f))), F(1.0f), p > F(0x1p126f));
        top[r][v] = at::vec::clamp_min(top[r][v], own);
        scale[r][v] = kept.over(top[r][v]);
      }
  }

  // Raises `top` to the largest power of the products of one lane.
  void raise(int64_t first, int64_t last, F (&top)[ROWS][VECTORS]) const {
    for (int64_t i = first; i < last; i += spec.lanes)
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) top[r][v] = at::vec::clamp_min(top[r][v], product_power(i, r, v));
  }

  // Adds what the unit keeps of the products of one lane, in multiples of 1 / scale: less than 2**27 of each, so that
  // int32 holds the sum of sixteen.
  void add_kept(int64_t first, int64_t last, const F (&scale)[ROWS][VECTORS], Halves (&sum)[ROWS][VECTORS]) const {
    for (int64_t i = first; i < last; i += 16 * spec.lanes) {
      Integers part[ROWS][VECTORS];
      for (auto& row : part) std::fill(row, row + VECTORS, Integers(0));
      add_integers(i, std::min(i + 16 * spec.lanes, last), scale, part);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
          const Halves wide = widen(part[r][v]);
          sum[r][v] = {sum[r][v].low + wide.low, sum[r][v].high + wide.high};
        }
    }
  }

  C10_ALWAYS_INLINE void add_integers(int64_t first, int64_t last, const F (&scale)[ROWS][VECTORS], Integers (&sum)[ROWS][VECTORS]) const {
    for (int64_t k = first; k < last; k += spec.lanes)
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v)
          sum[r][v] = sum[r][v] + at::vec::convert_to_int_of_same_size(product(k, r, v) * scale[r][v]);
  }
};

// The smallest magnitude that is not zero, and the largest one; 0 and the largest if all are zero.
std::pair<double, double> range(const float* x, int64_t count) {
  uint32_t least = UINT32_MAX, largest = 0;  // of the bits of magnitudes; `least` is 1 less, so that a zero is the largest
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7FFFFFFFu;
    least = std::min(least, bits - 1);
    largest = std::max(largest, bits);
  }
  const uint32_t ends[2] = {least + 1, largest};
  float values[2];
  std::memcpy(values, ends, sizeof values);
  return {values[0], values[1]};
}

// Whether `InFloat32` can take all products that are not zero.
bool products_are_normal(const float* a, int64_t count_a, const float* b, int64_t count_b) {
  const auto [least_a, largest_a] = range(a, count_a);
  const auto [least_b, largest_b] = range(b, count_b);
  return least_a * least_b >= InFloat32::LEAST_PRODUCT && largest_a * largest_b <= InFloat32::LARGEST_PRODUCT;
}

// `count` numbers of an operand, packed `width` apart, and the powers of their exponents. Subnormal elements, which have
// the least exponent, were multiplied by scales. `per_scale` numbers in a row have one scale.
template <typename T>
void pack(const Specification& spec, const float* source, int64_t count, T* values, T* powers, int64_t width,
          double least, const float* scales, int64_t per_scale) {
  const bool has_powers = spec.order == ALIGNED || spec.order == LATE;
  if (!spec.flush && !has_powers) {
    if (width == 1) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) values[i] = T(source[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) values[i * width] = T(source[i]);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    double x = double(source[i]);
    const double size = std::fabs(x);
    if (spec.flush && size < least) x = std::copysign(0.0, x);
    const double scale = scales ? scales[i / per_scale] : 1.0;
    const double own = from_bits(to_bits(spec.group > 1 ? scale : size) & 0x7FF0000000000000u);
    const double power = std::max(own, spec.group > 1 ? least : least * scale);
    values[i * width] = T(x);
    if (has_powers) powers[i * width] = T(x == 0 ? 0.0 : power <= 0x1p1000 ? power : 1.0);
  }
}

// The numbers and powers of `pack`, not initialized.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> values, powers;
  explicit Buffer(int64_t size) : values(new T[size]), powers(new T[size]) {}
};

class Output {
 public:
  Output(const Specification& spec, float* narrow, double* wide) : narrow_(narrow), wide_(wide) {
    const uint32_t bits = uint32_t(spec.nan_bits);
    std::memcpy(&nan_, &bits, sizeof nan_);
  }
  void store(int64_t index, double x) const {
    if (wide_) wide_[index] = x;
    else narrow_[index] = std::isnan(x) ? nan_ : float(x);
  }

 private:
  float* narrow_;
  double* wide_;
  float nan_;
};

// The place of a tile in the result, and how much of the tile lies in it.
struct Corner {
  int64_t batch, row, column, rows, columns;
};

int64_t blocks_of_scales(const Specification& spec, int64_t depth) {
  return spec.scale_block ? (depth + spec.scale_block - 1) / spec.scale_block : 0;
}

// Calls `compute` for all tiles of the result. A block of rows is packed once, and every strip of columns once for it.
template <typename T, typename Compute>
void run(const Specification& spec, const float* a, const float* b, const float* scales_a, const float* scales_b, int64_t batches, int64_t rows, int64_t columns,
         int64_t depth, int64_t threads, const Compute& compute) {
  constexpr int64_t width = COLUMNS<T>;
  const int64_t strips = (columns + width - 1) / width, tiles = (rows + ROWS - 1) / ROWS;
  const int64_t most = std::clamp<int64_t>((1 << 18) / std::max<int64_t>(depth, 1) / ROWS, 8, 64);
  const int64_t blocks = (tiles + most - 1) / most;
  const int64_t scale_count = blocks_of_scales(spec, depth);
  const float *joined_a = spec.rescale ? nullptr : scales_a, *joined_b = spec.rescale ? nullptr : scales_b;
  const int64_t groups = std::clamp<int64_t>(4 * threads / (batches * blocks), 1, strips);  // all threads need work
#pragma omp parallel num_threads(threads)
  {
    const Ieee ieee;
    Buffer<T> left(most * ROWS * depth), right(depth * width);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < batches * blocks * groups; ++task) {
      const int64_t group = task % groups, block = task / groups % blocks, batch = task / groups / blocks;
      const int64_t first = block * most, last = std::min(first + most, tiles);
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t offset = (tile - first) * ROWS * depth;
        for (int64_t i = 0; i < ROWS; ++i) {  // rows beyond the last one repeat it
          const int64_t row = batch * rows + std::min(tile * ROWS + i, rows - 1);
          pack(spec, a + row * depth, depth, left.values.get() + offset + i, left.powers.get() + offset + i, ROWS,
               spec.least_a, joined_a ? joined_a + row * scale_count : nullptr, spec.scale_block);
        }
      }
      for (int64_t strip = group * strips / groups; strip < (group + 1) * strips / groups; ++strip) {
        const int64_t count = std::min(width, columns - strip * width);
        if (count < width) {  // columns beyond the last one are zero
          std::fill_n(right.values.get(), depth * width, T(0));
          std::fill_n(right.powers.get(), depth * width, T(0));
        }
        for (int64_t k = 0; k < depth; ++k)
          pack(spec, b + (batch * depth + k) * columns + strip * width, count, right.values.get() + k * width,
               right.powers.get() + k * width, 1, spec.least_b,
               joined_b ? joined_b + (batch * scale_count + k / spec.scale_block) * columns + strip * width : nullptr, 1);
        for (int64_t tile = first; tile < last; ++tile) {
          const int64_t offset = (tile - first) * ROWS * depth;
          const Packed<T> packed{left.values.get() + offset, left.powers.get() + offset, right.values.get(),
                                 right.powers.get()};
          const int64_t row = tile * ROWS;
          compute(packed, Corner{batch, row, strip * width, std::min<int64_t>(ROWS, rows - row), count});
        }
      }
    }
  }
}

// Adds the partial sums of `promote` products by `combine`, which takes their number.
template <typename Vec, typename Accumulate, typename Combine>
void promoted_sums(const Specification& spec, int64_t depth, Vec (&total)[ROWS][VECTORS], double start,
                   const Accumulate& accumulate, const Combine& combine) {
  const int64_t length = spec.promote ? spec.promote : std::max<int64_t>(depth, 1);
  for (int64_t k = 0; k < depth; k += length) {
    Vec part[ROWS][VECTORS];
    for (auto& row : part) std::fill(row, row + VECTORS, Vec(start));
    accumulate(k, std::min(k + length, depth), part);
    combine(k / length, part, total);
  }
}

// Adds partial sums in float32, to nearest even: plainly, or multiplied by the scales of their blocks.
template <typename T, typename ToFloat32>
struct Combine {
  using Vec = at::vec::Vectorized<T>;
  const Specification& spec;
  const Corner& corner;
  const float *scales_a, *scales_b;
  int64_t rows, columns, parts;
  ToFloat32 to_float32;

  void operator()(int64_t number, const Vec (&part)[ROWS][VECTORS], Vec (&total)[ROWS][VECTORS]) const {
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v)
        total[r][v] = spec.rescale ? scaled(number, r, v, part[r][v], total[r][v])
                      : number     ? to_float32(total[r][v] + part[r][v])
                                   : part[r][v];
  }

 private:
  // fma(part, scale, total), where the product of both scales is rounded to float32.
  Vec scaled(int64_t number, int r, int v, Vec part, Vec total) const {
    T sums[Vec::size()], totals[Vec::size()];
    part.store(sums);
    total.store(totals);
    const int64_t row = corner.batch * rows + corner.row + std::min<int64_t>(r, corner.rows - 1);
    const float a = scales_a[row * parts + number];
    const float* b = scales_b + (corner.batch * parts + number) * columns + corner.column;
    for (int64_t lane = 0; lane < Vec::size(); ++lane) {
      const float scale = a * b[std::min(v * Vec::size() + lane, corner.columns - 1)];
      totals[lane] = T(std::fma(float(sums[lane]), scale, float(totals[lane])));
    }
    return Vec::loadu(totals);
  }
};

// Counts the sums that a step left as they were although its products do not add up to zero, and these steps.
template <typename T>
class Watch {
 public:
  using Vec = at::vec::Vectorized<T>;
  Watch(const Specification& spec, const Packed<T>& tile, const Corner& corner)
      : tile_(tile), corner_(corner), step_(spec.block ? spec.block : std::max<int64_t>(spec.length, 1)) {}

  template <typename Accumulate>
  void operator()(int64_t first, int64_t last, Vec (&c)[ROWS][VECTORS], const Accumulate& accumulate) {
    for (int64_t k = first; k < last; k += step_) {
      const int64_t end = std::min(k + step_, last);
      T before[ROWS * COLUMNS<T>], after[ROWS * COLUMNS<T>];
      copy(c, before);
      accumulate(k, end, c);
      copy(c, after);
      for (int64_t r = 0; r < corner_.rows; ++r)
        for (int64_t j = 0; j < corner_.columns; ++j) {
          double sum = 0;
          for (int64_t i = k; i < end; ++i) sum += double(tile_.a[i * ROWS + r]) * double(tile_.b[i * COLUMNS<T> + j]);
          const int64_t place = r * COLUMNS<T> + j;
          if (sum == 0 || !std::isfinite(before[place])) continue;
          ++steps_;
          if (before[place] == after[place]) {
            ++idle_;
            stagnated_[place] = true;
          }
        }
    }
  }

  // Adds to counts: the sums with such a step, such steps, and all steps whose products do not add up to zero.
  void add_to(int64_t* counts) const {
    const int64_t own[] = {std::count(stagnated_, stagnated_ + ROWS * COLUMNS<T>, true), idle_, steps_};
    for (int i = 0; i < 3; ++i) {
#pragma omp atomic
      counts[i] += own[i];
    }
  }

 private:
  static void copy(const Vec (&from)[ROWS][VECTORS], T* to) {
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) from[r][v].store(to + r * COLUMNS<T> + v * Vec::size());
  }

  const Packed<T>& tile_;
  const Corner& corner_;
  int64_t step_, idle_ = 0, steps_ = 0;
  bool stagnated_[ROWS * COLUMNS<T>] = {};
};

template <typename T>
void store(const Output& output, const at::vec::Vectorized<T> (&results)[ROWS][VECTORS], const Corner& corner,
           int64_t rows, int64_t columns) {
  T values[COLUMNS<T>];
  for (int64_t r = 0; r < corner.rows; ++r) {
    for (int v = 0; v < VECTORS; ++v) results[r][v].store(values + v * at::vec::Vectorized<T>::size());
    const int64_t first = (corner.batch * rows + corner.row + r) * columns + corner.column;
    for (int64_t j = 0; j < corner.columns; ++j) output.store(first + j, double(values[j]));
  }
}

// Rounds float64 to float32, to nearest even. (A cast to float and back is no rounding to every compiler.)
struct ToFloat32 {
  V operator()(V x) const {
    const V magic = at::vec::clamp_max(at::vec::clamp_min(power(x), V(0x1p-126)), V(0x1p900)) * V(0x1.8p29);
    const V size = magnitude(x), r = (size + magic) - magic;
    const V infinite(std::numeric_limits<double>::infinity());
    return choose(r >= V(0x1p128), infinite, r) | (x & Mask::sign());
  }
};

// Computes one tile: `accumulate` adds products to sums that begin with `start`.
template <typename T, typename ToFloat32, typename Accumulate>
void tile_of_result(const Combine<T, ToFloat32>& combine, const Packed<T>& packed, int64_t depth, double start,
                    const Output& output, int64_t* counts, const Accumulate& accumulate) {
  using Vec = at::vec::Vectorized<T>;
  const Specification& spec = combine.spec;
  Vec total[ROWS][VECTORS];
  for (auto& row : total) std::fill(row, row + VECTORS, Vec(T(0)));
  if (counts) {
    Watch<T> watch(spec, packed, combine.corner);
    promoted_sums(spec, depth, total, start,
                  [&](int64_t first, int64_t last, Vec(&part)[ROWS][VECTORS]) { watch(first, last, part, accumulate); }, combine);
    watch.add_to(counts);
  } else {
    promoted_sums(spec, depth, total, start, accumulate, combine);
  }
  store<T>(output, total, combine.corner, combine.rows, combine.columns);
}

}  // namespace

// out = a @ b: a (batches, rows, depth), b (batches, depth, columns), out float32 in `narrow` or float64 in `wide`. The
// scales of blocks of a and b, or null: (batches, rows, blocks), (batches, blocks, columns). The elements have been
// multiplied by them, unless `rescale` is set. `counts`, or null: those of `Watch`.
extern "C" void fpsim_accumulate(const Specification* specification, const float* a, const float* b, const float* scales_a,
                                 const float* scales_b, float* narrow, double* wide, int64_t* counts, int64_t batches,
                                 int64_t rows, int64_t columns, int64_t depth, int64_t threads) {
  const Specification& spec = *specification;
  const Output output(spec, narrow, wide);
  const int64_t parts = blocks_of_scales(spec, depth);
  if (spec.narrow) {
    using Vec = at::vec::Vectorized<float>;
    const auto plain = [](Vec x) { return x; };
    const CutInFloat32 cut(spec);
    run<float>(spec, a, b, scales_a, scales_b, batches, rows, columns, depth, threads,
               [&](const Packed<float>& packed, const Corner& corner) {
                 tile_of_result(Combine<float, decltype(plain)>{spec, corner, scales_a, scales_b, rows, columns, parts, plain},
                                packed, depth, 0.0, output, counts, [&](int64_t first, int64_t last, Vec(&part)[ROWS][VECTORS]) {
                                  aligned<float>(spec, packed, first, last, part, cut);
                                });
               });
    return;
  }
  const Rounder rounder(spec);
  if (spec.short_products && depth < 1 << 20 && products_are_normal(a, batches * rows * depth, b, batches * depth * columns)) {
    const auto plain = [](F x) { return x; };
    const V mask(from_bits(~((uint64_t(1) << (52 - spec.mantissa_bits)) - 1)));
    const auto cut = [mask](V x) { return x & mask; };
    const RoundInFloat64<NEAREST> nearest{rounder, V(spec.least_power)};
    run<float>(spec, a, b, scales_a, scales_b, batches, rows, columns, depth, threads,
               [&](const Packed<float>& packed, const Corner& corner) {
                 const InFloat32 tile(packed, spec);
                 tile_of_result(Combine<float, decltype(plain)>{spec, corner, scales_a, scales_b, rows, columns, parts, plain},
                                packed, depth, 0.0, output, counts, [&](int64_t first, int64_t last, F(&part)[ROWS][VECTORS]) {
                                  if (spec.block) tile.blocks(first, last, part);
                                  else if (spec.order == LATE) spec.lanes == 2 ? tile.late<2>(first, last, part) : tile.late<1>(first, last, part);
                                  else if (InFloat32::fits_int32(spec)) tile.cut(first, last, part);
                                  else if (spec.cuts) tile.aligned(first, last, part, cut);
                                  else tile.aligned(first, last, part, nearest);
                                });
               });
    return;
  }
  run<double>(spec, a, b, scales_a, scales_b, batches, rows, columns, depth, threads,
              [&](const Packed<double>& packed, const Corner& corner) {
                const int64_t element = spec.first_element + (corner.batch * rows + corner.row) * columns + corner.column;
                const Tile tile(packed, spec, rounder, element, columns);
                tile_of_result(Combine<double, ToFloat32>{spec, corner, scales_a, scales_b, rows, columns, parts, {}},
                               packed, depth, spec.start, output, counts,
                               [&](int64_t first, int64_t last, V(&part)[ROWS][VECTORS]) {
                                 if (spec.bounded) tile.accumulate<BOUNDED>(first, last, part);
                                 else if (spec.rounding == NEAREST_EVEN) tile.accumulate<NEAREST>(first, last, part);
                                 else tile.accumulate<GENERAL>(first, last, part);
                               });
              });
}

namespace {

// Whether the products `first` to `last` - 1 of one result are all -0.
bool all_negative_zero(const float* a, const float* b, int64_t stride_b, int64_t first, int64_t last) {
  for (int64_t k = first; k < last; ++k) {
    const double product = double(a[k]) * double(b[k * stride_b]);
    if (product != 0 || !std::signbit(product)) return false;
  }
  return true;
}

template <Mode MODE>
void add_chunk(const Specification& spec, const double* products, double* sums, const float* a, const float* b,
               int64_t count, int64_t rows, int64_t columns, int64_t depth, int64_t first, int64_t threads) {
  const Rounder round(spec);
  const int64_t last = std::min(first + spec.length, depth), step = first / spec.length;
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < count; ++row) {
    const Ieee ieee;
    const float* column = b + row / rows * depth * columns;
    for (int64_t j = 0; j < columns; j += V::size()) {
      const int64_t place = row * columns + j, size = std::min<int64_t>(V::size(), columns - j);
      const V before = V::loadu(sums + place, size);
      V s = before + V::loadu(products + place, size);
      if (s.zero_mask()) {
        double exact[V::size()], old[V::size()];
        s.store(exact);
        before.store(old);
        for (int64_t lane = 0; lane < size; ++lane)
          if (exact[lane] == 0)
            exact[lane] = std::signbit(old[lane]) && all_negative_zero(a + row * depth, column + j + lane, columns, first, last) ? -0.0 : 0.0;
        s = V::loadu(exact);
      }
      round.operator()<MODE>(s, {spec.first_element + place, step}).store(sums + place, size);
    }
  }
}

}  // namespace

// Adds one chunk, the products from `first` on, to `sums` and rounds: `products` is its exact sum, but for the sign of a
// zero. Both have `count` rows, of batches of `rows`; a (count, depth), b (count / rows, depth, columns).
extern "C" void fpsim_add_chunk(const Specification* specification, const double* products, double* sums, const float* a,
                                const float* b, int64_t count, int64_t rows, int64_t columns, int64_t depth, int64_t first,
                                int64_t threads) {
  const Specification& spec = *specification;
  const auto add = spec.bounded ? add_chunk<BOUNDED> : spec.rounding == NEAREST_EVEN ? add_chunk<NEAREST> : add_chunk<GENERAL>;
  add(spec, products, sums, a, b, count, rows, columns, depth, first, threads);
}
