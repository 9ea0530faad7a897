// The GPU's checksum on the CPU: the same arithmetic, slice by slice, in any order, against a bit-by-bit CRC.
#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../gpu/crc32c.cuh"
#include "check.hpp"
#include "emulated_cuda.hpp"
//
#include "../gpu/crc32c.cu"  // behind what it is made of here

using namespace hcache::gpu;

namespace {

std::uint32_t slow_crc32c(const unsigned char* bytes, std::size_t num_bytes) {
    std::uint32_t crc = 0xFFFFFFFF;
    for (std::size_t idx = 0; idx < num_bytes; ++idx) {
        crc ^= bytes[idx];
        for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) != 0 ? (crc >> 1) ^ 0x82F63B78 : crc >> 1;
    }
    return ~crc;
}

struct Tables {
    Tables() {
        for (unsigned idx = 0; idx < kNumTables; ++idx) {
            for (unsigned byte = 0; byte < kNumEntries; ++byte) entries[idx][byte] = table_entry(idx, byte);
        }
    }
    std::uint32_t entries[kNumTables][kNumEntries];
};

std::mt19937 random_bits(1);

/// As the kernel does it, the slices shuffled.
std::uint32_t sliced_crc32c(const unsigned char* bytes, std::size_t num_bytes) {
    static const Tables tables;
    static const Powers powers = make_powers();
    std::vector<std::uint64_t> order(num_slices(num_bytes));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_bits);
    std::uint32_t crc = crc_of_zeros(powers, num_bytes);
    for (const std::uint64_t slice : order) crc ^= share_of(tables.entries, powers, bytes, num_bytes, slice);
    return crc;
}

void known_values() {
    const auto of = [](const char* text) {
        return sliced_crc32c(reinterpret_cast<const unsigned char*>(text), std::strlen(text));
    };
    CHECK(of("") == 0);
    CHECK(of("123456789") == 0xE3069283);  // the catalogue's check value
    // RFC 3720, B.4
    unsigned char bytes[32] = {};
    CHECK(sliced_crc32c(bytes, 32) == 0x8A9136AA);
    std::fill_n(bytes, 32, static_cast<unsigned char>(0xFF));
    CHECK(sliced_crc32c(bytes, 32) == 0x62A8AB43);
    std::iota(bytes, bytes + 32, static_cast<unsigned char>(0));
    CHECK(sliced_crc32c(bytes, 32) == 0x46DD794E);
    std::reverse(bytes, bytes + 32);
    CHECK(sliced_crc32c(bytes, 32) == 0x113FDB5C);
}

void every_length_and_place() {
    std::vector<unsigned char> bytes(524'289 + 64);
    for (auto& byte : bytes) byte = static_cast<unsigned char>(random_bits());
    std::vector<std::size_t> lengths{0,    1,    15,   16,   17,   63,   64,      1023,    1024,
                                     1025, 2048, 4095, 4096, 4097, 8191, 524'287, 524'288, 524'289};
    for (int idx = 0; idx < 60; ++idx) lengths.push_back(random_bits() % 20'000);
    for (const std::size_t length : lengths) {
        for (const std::size_t start : {std::size_t{0}, std::size_t{1}, std::size_t{16}, std::size_t{37}}) {
            CHECK(sliced_crc32c(&bytes[start], length) == slow_crc32c(&bytes[start], length));
            if (length > 100'000) break;
        }
    }
}

void one_flipped_bit_shows() {
    std::vector<unsigned char> bytes(100'000, 7);
    const std::uint32_t sound = sliced_crc32c(bytes.data(), bytes.size());
    for (int idx = 0; idx < 50; ++idx) {
        unsigned char& byte = bytes[random_bits() % bytes.size()];
        const auto flip = static_cast<unsigned char>(1U << random_bits() % 8);
        byte ^= flip;
        CHECK(sliced_crc32c(bytes.data(), bytes.size()) != sound);
        byte ^= flip;
    }
}

/// The kernel itself, thread by thread: pieces of different lengths in one launch, as `Checksum` launches it.
void the_kernel_sums_pieces() {
    std::vector<unsigned char> bytes(300'000);
    for (auto& byte : bytes) byte = static_cast<unsigned char>(random_bits());
    static const Powers powers = make_powers();
    std::vector<Piece> pieces;
    for (const std::size_t length : {0, 1, 1'023, 1'024, 1'025, 131'072, 131'073, 262'145}) {
        const std::size_t start = pieces.size() * 3;
        const auto address = reinterpret_cast<std::uint64_t>(&bytes[start]);
        pieces.push_back({address, length, crc_of_zeros(powers, length), 0});
    }
    const auto num_blocks = static_cast<unsigned>((num_slices(262'145) + kThreadsPerBlock - 1) / kThreadsPerBlock);
    emulated::launch({num_blocks, static_cast<unsigned>(pieces.size())}, kThreadsPerBlock,
                     [&] { hcache_crc32c(pieces.data(), powers); });
    for (const Piece& piece : pieces) {
        const auto* const from = reinterpret_cast<const unsigned char*>(piece.address);
        CHECK(piece.crc == slow_crc32c(from, piece.num_bytes));
    }
}

}  // namespace

int main() {
    RUN(known_values);
    RUN(every_length_and_place);
    RUN(one_flipped_bit_shows);
    RUN(the_kernel_sums_pieces);
}
