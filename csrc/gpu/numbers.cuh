// float16, bfloat16 and float32 as bits, and their way to float32 and back: to the nearest even, without CUDA's
// headers.
#pragma once

#include <cstdint>
#include <cstring>

#include "anywhere.cuh"

namespace hcache::gpu {

HCACHE_ANYWHERE inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

HCACHE_ANYWHERE inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Float32 {
    using Bits = std::uint32_t;
    HCACHE_ANYWHERE static float widen(Bits bits) { return float_of(bits); }
    HCACHE_ANYWHERE static Bits narrow(float value) { return bits_of(value); }
};

struct Bfloat16 {
    using Bits = std::uint16_t;
    HCACHE_ANYWHERE static float widen(Bits bits) { return float_of(std::uint32_t{bits} << 16); }
    HCACHE_ANYWHERE static Bits narrow(float value) {
#ifdef __CUDA_ARCH__
        Bits bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
#else
        const std::uint32_t bits = bits_of(value);
        if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;  // no number: rounding could carry it into an infinity
        return static_cast<Bits>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
#endif
    }
};

struct Float16 {
    using Bits = std::uint16_t;
    HCACHE_ANYWHERE static float widen(Bits bits) {
#ifdef __CUDA_ARCH__
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
#else
        const std::uint32_t sign = std::uint32_t{bits & 0x8000U} << 16;
        const std::uint32_t exponent = (bits >> 10) & 0x1F, fraction = bits & 0x3FFU;
        if (exponent == 0) {  // fraction * 2^-24, exactly
            return float_of(sign | bits_of(static_cast<float>(fraction) * float_of(0x33800000)));
        }
        return float_of(sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13));
#endif
    }
    HCACHE_ANYWHERE static Bits narrow(float value) {
#ifdef __CUDA_ARCH__
        Bits bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
#else
        const std::uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFF;
        const std::uint32_t sign = (bits >> 16) & 0x8000;
        if (magnitude > 0x7F800000) return static_cast<Bits>(sign | 0x7E00);
        if (magnitude >= 0x477FF000) return static_cast<Bits>(sign | 0x7C00);  // from 65520 on
        if (magnitude < 0x38800000) {  // below 2^-14: next to 0.5, a float32's last place is worth 2^-24
            return static_cast<Bits>(sign | (bits_of(float_of(magnitude) + 0.5F) - bits_of(0.5F)));
        }
        return static_cast<Bits>(sign | ((magnitude - (112U << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13));
#endif
    }
};

}  // namespace hcache::gpu
