// Elementary functions by polynomial, so that every machine and library version agrees.
#pragma once

#include "vec.h"

namespace coppice {
namespace COPPICE_ISA {

// e^x: x = n ln 2 + r, |r| <= ln 2 / 2, e^r by a degree-6 polynomial (Cephes, expf).
// Exactly 1 at 0, exactly 0 below -87 (so masked logits vanish), saturates above 88.
COPPICE_INLINE V16 exp16(V16 x) {
  const V16 high = splat(88.0f), low = splat(-87.0f), magic = splat(12582912.0f);
  V16 y = where_less(high, x, high, x);
  y = where_less(y, low, low, y);
  const V16 shifted = fma(y, splat(1.44269504088896341f), magic);  // n in the low bits
  const V16 n = shifted - magic;
  V16 r = fma(n, splat(-0.693359375f), y);
  r = fma(n, splat(2.12194440e-4f), r);
  V16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  V16 power;
  COPPICE_EACH {
    const vi bits = (vi)shifted.v[i] - 0x4b400000;  // the integer n
    power.v[i] = (vf)((bits + 127) << 23);
  }
  return where_less(x, low, splat(0.0f), p * power);
}

// Cephes tanhf: odd polynomial near zero, exponential elsewhere.
COPPICE_INLINE V16 tanh16(V16 x) {
  const V16 zero = splat(0.0f), one = splat(1.0f);
  const V16 size = where_less(x, zero, zero - x, x);
  const V16 z = x * x;
  V16 p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const V16 near = fma(p * z, x, x);
  const V16 far = one - splat(2.0f) / (exp16(size + size) + one);
  return where_less(size, splat(0.625f), near, where_less(x, zero, zero - far, far));
}

COPPICE_INLINE V16 silu16(V16 x) { return x / (splat(1.0f) + exp16(splat(0.0f) - x)); }

// 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
COPPICE_INLINE V16 gelu_tanh16(V16 x) {
  const V16 inner = fma(x * x * x, splat(0.044715f), x);
  return x / (splat(1.0f) + exp16(inner * splat(-1.5957691216057308f)));
}

// x Phi(x) with erf from Cephes (erff, erfcf); the tail uses erfc so small values keep
// their relative precision.
COPPICE_INLINE V16 gelu16(V16 x) {
  const V16 zero = splat(0.0f), one = splat(1.0f), half = splat(0.5f);
  const V16 u = x * splat(0.70710678118654752f);
  const V16 z = u * u;
  V16 t = splat(7.853861353153693e-5f);
  t = fma(t, z, splat(-8.010193625184903e-4f));
  t = fma(t, z, splat(5.188327685732524e-3f));
  t = fma(t, z, splat(-2.685381193529856e-2f));
  t = fma(t, z, splat(1.128358514861418e-1f));
  t = fma(t, z, splat(-3.761262582423300e-1f));
  t = fma(t, z, splat(1.128379165726710f));
  const V16 near = half * x * fma(t, u, one);
  const V16 size = where_less(u, zero, zero - u, u);
  const V16 q = one / where_less(size, one, one, size);
  const V16 y = q * q;
  V16 p = splat(2.326819970068386e-2f);
  p = fma(p, y, splat(-1.387039388740657e-1f));
  p = fma(p, y, splat(3.687424674597105e-1f));
  p = fma(p, y, splat(-5.824733027278666e-1f));
  p = fma(p, y, splat(6.210004621745983e-1f));
  p = fma(p, y, splat(-4.944515323274145e-1f));
  p = fma(p, y, splat(3.404879937665872e-1f));
  p = fma(p, y, splat(-2.741127028184656e-1f));
  p = fma(p, y, splat(5.638259427386472e-1f));
  V16 r = splat(-1.047766399936249e+1f);
  r = fma(r, y, splat(1.297719955372516e+1f));
  r = fma(r, y, splat(-7.495518717768503e+0f));
  r = fma(r, y, splat(2.921019019210786e+0f));
  r = fma(r, y, splat(-1.015265279202700e+0f));
  r = fma(r, y, splat(4.218463358204948e-1f));
  r = fma(r, y, splat(-2.820767439740514e-1f));
  r = fma(r, y, splat(5.641895067754075e-1f));
  const V16 tail = exp16(zero - z) * q * where_less(size, splat(2.0f), p, r);  // erfc(|u|)
  const V16 far = where_less(x, zero, half * x * tail, x - half * x * tail);
  return where_less(size, one, near, far);
}

}  // namespace COPPICE_ISA
}  // namespace coppice
