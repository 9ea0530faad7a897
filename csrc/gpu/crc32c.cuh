// CRC32C (Castagnoli, the value of the `crc32c` package) of pieces of memory, cut into slices that any number of
// threads may work off in any order. The arithmetic is the same on the host and on the GPU; g++ compiles it without
// CUDA.
//
// A CRC is the remainder of a polynomial over GF(2), here with reflected bits (bit 31 is x^0). For n bytes
//
//     crc(bytes) = ~( 0xFFFFFFFF * x^(8n)  +  remainder(bytes) )                              mod P,  + is xor
//     remainder(bytes) = sum over slices of  remainder(slice) * x^(8 * bytes after the slice)
//
// so each slice's share is added into a word that began as the first term.
#pragma once

#include <cstdint>
#include <cstring>

#include "anywhere.cuh"

namespace hcache::gpu {

inline constexpr std::uint32_t kPolynomial = 0x82F63B78;
inline constexpr unsigned kNumTables = 4;
inline constexpr unsigned kNumEntries = 256;
/// What one thread folds. Shorter ones cost more multiplications, longer ones leave threads idle.
inline constexpr std::uint64_t kSliceBytes = 1024;
inline constexpr unsigned kThreadsPerBlock = 128;
inline constexpr unsigned kNumPowers = 40;  // lengths up to 1 TiB
inline constexpr char kKernelName[] = "hcache_crc32c";

/// One piece and its sum. `crc` begins as `crc_of_zeros(powers, num_bytes)` and is complete when all shares are in.
struct Piece {
    std::uint64_t address;
    std::uint64_t num_bytes;
    std::uint32_t crc;
    std::uint32_t unused;
};

/// Entry k is x^(8 * 2^k).
struct Powers {
    std::uint32_t of[kNumPowers];
};

/// Entry `byte` of table `idx`: remainder of the byte with `idx` zero bytes after it.
HCACHE_ANYWHERE inline std::uint32_t table_entry(unsigned idx, unsigned byte) {
    std::uint32_t remainder = byte;
    for (unsigned bit = 0; bit < 8 * (idx + 1); ++bit) {
        remainder = (remainder >> 1) ^ ((remainder & 1) != 0 ? kPolynomial : 0);
    }
    return remainder;
}

HCACHE_ANYWHERE inline std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
    std::uint32_t product = 0;
    for (std::uint32_t bit = 0x80000000; bit != 0; bit >>= 1) {
        product ^= (a & bit) != 0 ? b : 0;
        b = (b >> 1) ^ ((b & 1) != 0 ? kPolynomial : 0);
    }
    return product;
}

inline Powers make_powers() {
    Powers powers{};
    std::uint32_t power = 0x00800000;  // x^8
    for (std::uint32_t& entry : powers.of) {
        entry = power;
        power = multiply(power, power);
    }
    return powers;
}

/// `remainder * x^(8 * num_bytes)`: the remainder once so many zero bytes have followed.
HCACHE_ANYWHERE inline std::uint32_t followed_by_zeros(const Powers& powers, std::uint32_t remainder,
                                                       std::uint64_t num_bytes) {
    for (unsigned k = 0; num_bytes != 0; ++k, num_bytes >>= 1) {
        if ((num_bytes & 1) != 0) remainder = multiply(remainder, powers.of[k]);
    }
    return remainder;
}

/// What a piece's `crc` begins as: the CRC of as many zeros.
HCACHE_ANYWHERE inline std::uint32_t crc_of_zeros(const Powers& powers, std::uint64_t num_bytes) {
    return ~followed_by_zeros(powers, 0xFFFFFFFF, num_bytes);
}

HCACHE_ANYWHERE inline std::uint32_t fold_word(const std::uint32_t (*tables)[kNumEntries], std::uint32_t remainder,
                                               std::uint32_t word) {
    word ^= remainder;
    return tables[3][word & 0xFF] ^ tables[2][(word >> 8) & 0xFF] ^ tables[1][(word >> 16) & 0xFF] ^
           tables[0][word >> 24];
}

/// Remainder of a run of bytes. Any address; one that is a multiple of 16 is read by 16 bytes at a time.
HCACHE_ANYWHERE inline std::uint32_t remainder_of(const std::uint32_t (*tables)[kNumEntries],
                                                  const unsigned char* bytes, std::uint64_t num_bytes) {
    struct alignas(16) Quad {
        std::uint32_t words[4];
    };
    std::uint32_t remainder = 0;
    const unsigned char* const stop = bytes + num_bytes;
    if (reinterpret_cast<std::uintptr_t>(bytes) % sizeof(Quad) == 0) {
        for (; stop - bytes >= static_cast<std::int64_t>(sizeof(Quad)); bytes += sizeof(Quad)) {
            Quad quad;
            std::memcpy(&quad, __builtin_assume_aligned(bytes, sizeof(Quad)), sizeof quad);
            for (const std::uint32_t word : quad.words) remainder = fold_word(tables, remainder, word);
        }
    }
    for (; bytes != stop; ++bytes) remainder = tables[0][(remainder ^ *bytes) & 0xFF] ^ (remainder >> 8);
    return remainder;
}

HCACHE_ANYWHERE inline std::uint64_t num_slices(std::uint64_t num_bytes) {
    return (num_bytes + kSliceBytes - 1) / kSliceBytes;
}

/// What slice `slice_idx` adds to its piece's `crc`. `bytes` is where the piece begins, for whoever runs this.
HCACHE_ANYWHERE inline std::uint32_t share_of(const std::uint32_t (*tables)[kNumEntries], const Powers& powers,
                                              const unsigned char* bytes, std::uint64_t num_bytes,
                                              std::uint64_t slice_idx) {
    const std::uint64_t start = slice_idx * kSliceBytes;
    const std::uint64_t left = num_bytes - start;
    const std::uint64_t length = left < kSliceBytes ? left : kSliceBytes;
    return followed_by_zeros(powers, remainder_of(tables, bytes + start, length), left - length);
}

}  // namespace hcache::gpu
