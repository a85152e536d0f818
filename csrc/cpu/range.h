// Heads whose numbers leave the range of the accumulation type on the way, though their results do not, are run once
// more in units that bring them to order one: inputs times powers of two, which change no digit. Nobody else pays.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace infsa::cpu {

// A number up to 2^kMostFactor may be squared or divided by with all its digits kept; sums of products may go further.
constexpr int kMostFactor = 50, kMostSum = 100;

// Whether |x| is 0 or within 2^-most .. 2^most, for double six times as far.
inline bool within(double x, int most, bool wide) {
  const double limit = wide ? std::ldexp(1, 6 * most) : std::ldexp(1, most);
  return x == 0 || (std::abs(x) >= 1 / limit && std::abs(x) < 2 * limit);
}

// The largest of some numbers, before they are rounded to the accumulation type, where all may be 0. NaN where one is.
struct Largest {
  double size = 0;

  void of(double x) {
    if (std::abs(x) > size || x != x) size = std::abs(x);
  }
};

// What brings numbers up to `largest` to order one; 0 where nothing does, since one is not finite.
inline double unit_of(double largest, bool wide) {
  const int limit = wide ? 1000 : 120;
  if (!std::isfinite(largest)) return 0;
  return largest == 0 ? 1 : std::ldexp(1, std::clamp(-std::ilogb(largest), -limit, limit));
}

// A scale that overflows would turn a sum of 0 into NaN.
inline double finite(double scale, bool wide) {
  const double most = wide ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  return scale > most ? most : scale < -most ? -most : scale;
}

}  // namespace infsa::cpu
