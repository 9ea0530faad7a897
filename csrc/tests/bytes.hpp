// Many bytes, made and compared in words and by the C library: byte by byte they cost the thread sanitizer seconds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <vector>

inline void fill_with_noise(std::span<std::byte> bytes, unsigned seed) {
    std::mt19937_64 random(seed);
    for (std::size_t at = 0; at < bytes.size(); at += sizeof(std::uint64_t)) {
        const std::uint64_t word = random();
        std::memcpy(&bytes[at], &word, std::min(sizeof word, bytes.size() - at));
    }
}

inline std::vector<std::byte> noise(std::size_t num_bytes, unsigned seed) {
    std::vector<std::byte> bytes(num_bytes);
    fill_with_noise(bytes, seed);
    return bytes;
}

inline bool same(std::span<const std::byte> left, std::span<const std::byte> right) {
    return left.size() == right.size() && (left.empty() || std::memcmp(left.data(), right.data(), left.size()) == 0);
}
