// Arithmetic that nvcc compiles for the GPU and g++ for its tests: rounded the same on both.
#pragma once

#ifdef __CUDACC__
#define HCACHE_ANYWHERE __host__ __device__
#else
#define HCACHE_ANYWHERE
#endif

#include <cmath>

namespace hcache::gpu {

// Each rounds once, to the nearest even: a product that melts into a sum (FMA, which nvcc makes unless told otherwise,
// and g++ may make on some CPUs: compile with -ffp-contract=off) would not be what torch computes.
HCACHE_ANYWHERE inline float multiply_once(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

HCACHE_ANYWHERE inline float add_once(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

HCACHE_ANYWHERE inline float divide_once(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

HCACHE_ANYWHERE inline float root_of(float a) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(a);
#else
    return std::sqrt(a);
#endif
}

/// Sine and cosine of any finite angle in radians, reduced exactly: CUDA's sincosf is within 2 units in the last place
/// at every angle, libm's within 1. The fast __sincosf reduces in float32 and is wrong by 0.06 at an angle of 10^6.
HCACHE_ANYWHERE inline void turn_by(float angle, float& sine, float& cosine) {
#ifdef __CUDA_ARCH__
    sincosf(angle, &sine, &cosine);
#else
    sine = std::sin(angle);
    cosine = std::cos(angle);
#endif
}

}  // namespace hcache::gpu
