// From projected rows to blocks, on the CPU: the same arithmetic as the kernel's, against a plain reference.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "../gpu/rope_scatter.cuh"
#include "check.hpp"
#include "emulated_cuda.hpp"
//
#include "../gpu/rope_scatter.cu"

using namespace hcache::gpu;

namespace {

std::mt19937 random_bits(7);

float random_float(float scale) {
    return std::normal_distribution<float>(0.0F, scale)(random_bits);
}

template <typename Number>
void check_rounding(float value) {  // no other number is nearer, and of two that are as near it is the even one
    using Bits = typename Number::Bits;
    const Bits got = Number::narrow(value);
    const double error = std::abs(double{Number::widen(got)} - value);
    for (const int step : {-1, 1}) {
        const auto other = static_cast<Bits>(got + step);
        const double widened = Number::widen(other);
        if (!std::isfinite(widened) || std::signbit(static_cast<float>(widened)) != std::signbit(value)) continue;
        const double its = std::abs(widened - value);
        CHECK(error < its || (error == its && got % 2 == 0));
    }
}

template <typename Number>
void check_all_numbers() {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        const float value = Number::widen(static_cast<typename Number::Bits>(bits));
        if (std::isnan(value)) {
            CHECK(std::isnan(Number::widen(Number::narrow(value))));
            continue;
        }
        CHECK(Number::narrow(value) == bits);
        if (!std::isfinite(value)) continue;
        const float next = Number::widen(static_cast<typename Number::Bits>(bits + 1));
        if (!std::isfinite(next)) continue;
        const float middle = value / 2 + next / 2;
        for (const float near : {middle, std::nextafter(middle, 0.0F), std::nextafter(middle, 2 * middle)}) {
            if (bits % 0x8000 != 0x7FFF) check_rounding<Number>(near);
        }
    }
}

void numbers_round_to_the_nearest_even() {
    check_all_numbers<Float16>();
    check_all_numbers<Bfloat16>();
    for (int idx = 0; idx < 200'000; ++idx) {
        const float value = std::ldexp(random_float(1), static_cast<int>(random_bits() % 30) - 22);
        check_rounding<Float16>(value);
        check_rounding<Bfloat16>(value);
    }
    CHECK(Float16::widen(0x0001) == std::ldexp(1.0F, -24) && Float16::widen(0x7BFF) == 65504.0F);
    CHECK(Float16::narrow(65519.0F) == 0x7BFF && Float16::narrow(65520.0F) == 0x7C00);
    CHECK(Float16::narrow(-1e9F) == 0xFC00 && Float16::narrow(std::ldexp(1.0F, -26)) == 0);
    CHECK(Bfloat16::narrow(std::nextafter(INFINITY, 0.0F)) == 0x7F80 && Bfloat16::narrow(-INFINITY) == 0xFF80);
    CHECK(std::isnan(Bfloat16::widen(Bfloat16::narrow(float_of(0x7FFFFFFF)))));
    CHECK(Bfloat16::widen(0x3F80) == 1.0F);
}

/// Inputs of one call: tokens in any order, blocks of any other.
template <typename Number>
struct Case {
    using Bits = typename Number::Bits;
    static constexpr unsigned kTokens = 5, kSlots = 23;

    Case(const Case&) = delete;  // `params` has addresses of what is here

    Case(unsigned num_heads, unsigned num_kv_heads, unsigned head_size, unsigned rotary_dim, bool is_normed,
         unsigned padding = 0)
        : row_elements((num_heads + 2 * num_kv_heads) * head_size),
          rows((row_elements + padding) * kTokens + kAlign),
          cache(std::size_t{kSlots} * 2 * num_kv_heads * head_size + kAlign),
          gamma(2 * head_size + kAlign),
          inv_freq(rotary_dim / 2) {
        for (Bits& bits : rows) bits = Number::narrow(random_float(2));
        for (Bits& bits : cache) bits = Number::narrow(random_float(2));
        for (Bits& bits : gamma) bits = Number::narrow(1 + random_float(0.2F));
        for (unsigned idx = 0; idx < rotary_dim / 2; ++idx) {
            inv_freq[idx] = 1 / std::pow(10'000.0F, 2.0F * static_cast<float>(idx) / static_cast<float>(rotary_dim));
        }
        params.rows = aligned(rows);
        params.cache = aligned(cache);
        if (is_normed) {
            params.k_gamma = aligned(gamma);
            if (num_heads != 0) params.q_gamma = params.k_gamma + head_size * sizeof(Bits);
        }
        params.inv_freq = reinterpret_cast<std::uint64_t>(inv_freq.data());
        params.positions = reinterpret_cast<std::uint64_t>(positions.data());
        params.slots = reinterpret_cast<std::uint64_t>(slots.data());
        params.num_tokens = kTokens;
        params.num_slots = kSlots;
        params.row_stride = row_elements + padding;
        params.num_heads = num_heads;
        params.num_kv_heads = num_kv_heads;
        params.head_size = head_size;
        params.rotary_dim = rotary_dim;
        params.eps = 1e-6F;
    }

    static constexpr unsigned kAlign = 16 / sizeof(Bits);
    static std::uint64_t aligned(const std::vector<Bits>& bits) {
        return (reinterpret_cast<std::uint64_t>(bits.data()) + 15) / 16 * 16;
    }

    unsigned row_elements;
    std::vector<Bits> rows, cache, gamma;
    std::vector<float> inv_freq;
    std::vector<std::int64_t> positions{0, 1, 4'095, 131'071, 1'048'575};
    std::vector<std::int64_t> slots{22, 0, 7, 8, 3};
    RopeScatter params{};
};

/// A head as the torch modules do it, step by step.
template <typename Number>
std::vector<float> reference(const std::vector<float>& head, const std::vector<float>& gamma, float eps,
                             std::int64_t position, const std::vector<float>& inv_freq) {
    const auto round = [](float value) { return Number::widen(Number::narrow(value)); };
    std::vector<float> x = head;
    if (!gamma.empty()) {
        double sum = 0;
        for (const float element : head) sum += double{element} * element;
        const float scale = 1 / std::sqrt(static_cast<float>(sum / static_cast<double>(head.size())) + eps);
        for (std::size_t idx = 0; idx < x.size(); ++idx) x[idx] = round(gamma[idx] * round(x[idx] * scale));
    }
    std::vector<float> turned = x;
    const std::size_t half = inv_freq.size();
    for (std::size_t idx = 0; idx < half; ++idx) {
        const float angle = static_cast<float>(position) * inv_freq[idx];
        const float products[] = {x[idx] * std::cos(angle), -x[half + idx] * std::sin(angle),
                                  x[half + idx] * std::cos(angle), x[idx] * std::sin(angle)};
        turned[idx] = round(products[0] + products[1]);
        turned[half + idx] = round(products[2] + products[3]);
    }
    return turned;
}

template <typename Number>
std::vector<float> floats(const typename Number::Bits* from, std::size_t count) {
    std::vector<float> wide(count);
    for (std::size_t idx = 0; idx < count; ++idx) wide[idx] = Number::widen(from[idx]);
    return wide;
}

template <typename Number>
using Memory = std::pair<std::vector<typename Number::Bits>, std::vector<typename Number::Bits>>;

/// `after`: rows and cache that began as those of `made`. Heads are the reference's, to the bit where nothing is normed
/// (else a sum's order may carry them `4 * unit` away); and nothing else has changed.
template <typename Number>
void check_against_reference(const Case<Number>& made, bool is_normed, double unit, const Memory<Number>& after) {
    using Bits = typename Number::Bits;
    const RopeScatter& params = made.params;
    const auto first_row = static_cast<std::size_t>(at<Bits>(params.rows) - made.rows.data());
    const auto first_slot = static_cast<std::size_t>(at<Bits>(params.cache) - made.cache.data());
    std::vector<Bits> want_rows = made.rows, want_cache = made.cache;
    const std::size_t head_size = params.head_size, kv_elements = params.num_kv_heads * head_size;
    for (std::size_t token = 0; token < Case<Number>::kTokens; ++token) {
        const std::size_t row = first_row + token * static_cast<std::size_t>(params.row_stride);
        const std::size_t slot = first_slot + static_cast<std::size_t>(made.slots[token]) * 2 * kv_elements;
        for (std::size_t idx = 0; idx < params.num_heads + params.num_kv_heads; ++idx) {
            const bool is_q = idx < params.num_heads;
            const std::uint64_t gamma = is_q ? params.q_gamma : params.k_gamma;
            const auto want =
                reference<Number>(floats<Number>(&made.rows[row + idx * head_size], head_size),
                                  gamma == 0 ? std::vector<float>() : floats<Number>(at<const Bits>(gamma), head_size),
                                  params.eps, made.positions[token], made.inv_freq);
            const std::size_t place = is_q ? row + idx * head_size : slot + (idx - params.num_heads) * head_size;
            Bits* const target = &(is_q ? want_rows : want_cache)[place];
            const Bits* const got = &(is_q ? after.first : after.second)[place];
            float largest = 0;
            for (const float element : want) largest = std::max(largest, std::abs(element));
            for (std::size_t element = 0; element < head_size; ++element) {
                target[element] = Number::narrow(want[element]);
                if (!is_normed) continue;
                const double error = std::abs(double{Number::widen(got[element])} - want[element]);
                CHECK(error <= 4 * unit * largest);
                target[element] = got[element];
            }
        }
        const std::size_t values = row + (params.num_heads + params.num_kv_heads) * head_size;
        std::copy_n(&made.rows[values], kv_elements, &want_cache[slot + kv_elements]);
    }
    CHECK(after.first == want_rows);
    CHECK(after.second == want_cache);
}

/// By the arithmetic alone, token by token, and by the kernel: the same, to the bit.
template <typename Number, unsigned kCount>
void check_width(Case<Number>& made, bool is_normed, double unit, void (*kernel)(RopeScatter)) {
    const Memory<Number> before{made.rows, made.cache};
    for (const std::int64_t token : {3, 0, 4, 1, 2}) CHECK((place_token<Number, kCount>(made.params, token)));
    const Memory<Number> after{made.rows, made.cache};
    std::copy(before.first.begin(), before.first.end(), made.rows.begin());
    std::copy(before.second.begin(), before.second.end(), made.cache.begin());
    check_against_reference(made, is_normed, unit, after);
    emulated::launch(Case<Number>::kTokens, kScatterThreads, [&] { kernel(made.params); });
    CHECK(made.rows == after.first && made.cache == after.second);
    std::copy(before.first.begin(), before.first.end(), made.rows.begin());
    std::copy(before.second.begin(), before.second.end(), made.cache.begin());
}

template <typename Number>
struct Entries;
template <>
struct Entries<Float16> {
    static constexpr auto wide = hcache_rope_scatter_float16, narrow = hcache_rope_scatter_float16_unaligned;
};
template <>
struct Entries<Bfloat16> {
    static constexpr auto wide = hcache_rope_scatter_bfloat16, narrow = hcache_rope_scatter_bfloat16_unaligned;
};
template <>
struct Entries<Float32> {
    static constexpr auto wide = hcache_rope_scatter_float32, narrow = hcache_rope_scatter_float32_unaligned;
};

template <typename Number>
void check_case(Case<Number>&& made, bool is_normed, double unit) {
    constexpr unsigned kWide = kVectorBytes / sizeof(typename Number::Bits);
    check_width<Number, 1>(made, is_normed, unit, Entries<Number>::narrow);
    if (fits_vectors(made.params, sizeof(typename Number::Bits), kWide)) {
        check_width<Number, kWide>(made, is_normed, unit, Entries<Number>::wide);
    }
}

template <typename Number>
void check_all(double unit) {
    for (const bool is_normed : {false, true}) {
        for (const unsigned head_size : {64U, 80U, 96U, 128U, 256U}) {
            check_case(Case<Number>(0, 2, head_size, head_size, is_normed), is_normed, unit);
        }
        check_case(Case<Number>(4, 2, 64, 64, is_normed), is_normed, unit);
        check_case(Case<Number>(6, 1, 80, 32, is_normed, 16), is_normed, unit);
        check_case(Case<Number>(3, 3, 64, 20, is_normed), is_normed, unit);    // turns at no vector's end
        check_case(Case<Number>(2, 1, 10, 4, is_normed, 3), is_normed, unit);  // nor do rows end at one
        check_case(Case<Number>(2, 2, 64, 0, is_normed), is_normed, unit);     // OPT: nothing turns
        check_case(Case<Number>(0, 1, 512, 512, is_normed), is_normed, unit);
    }
}

void heads_are_those_of_torch() {
    check_all<Float16>(std::ldexp(1.0, -10));
    check_all<Bfloat16>(std::ldexp(1.0, -7));
    check_all<Float32>(std::ldexp(1.0, -22));
}

void a_slot_outside_the_cache_takes_nothing() {
    for (const std::int64_t slot : {std::int64_t{-1}, std::int64_t{23}, std::int64_t{1} << 40}) {
        Case<Float16> made(2, 2, 64, 64, true);
        made.slots[1] = slot;
        const auto rows = made.rows, cache = made.cache;
        CHECK((!place_token<Float16, 8>(made.params, 1)));
        CHECK(rows == made.rows && cache == made.cache);
    }
}

void a_position_outside_the_tables_takes_nothing() {
    Case<Float16> made(2, 2, 64, 64, true);
    const std::vector<float> table(32 * 4'096);
    made.params.sines = made.params.cosines = reinterpret_cast<std::uint64_t>(table.data());
    made.params.num_positions = 4'095;
    CHECK((place_token<Float16, 8>(made.params, 1)));
    const auto rows = made.rows, cache = made.cache;
    made.positions[1] = -1;
    for (const std::int64_t token : {1, 2, 3}) CHECK((!place_token<Float16, 8>(made.params, token)));
    CHECK(rows == made.rows && cache == made.cache);
}

/// Both ways to angles: the same to the bit where one libm made both.
void angles_may_come_from_tables() {
    Case<Bfloat16> made(3, 2, 128, 128, true);
    constexpr std::int64_t kPositions = 4'096;
    std::vector<float> sines, cosines;
    for (std::int64_t position = 0; position < kPositions; ++position) {
        for (const float inv_freq : made.inv_freq) {
            sines.push_back(std::sin(static_cast<float>(position) * inv_freq));
            cosines.push_back(std::cos(static_cast<float>(position) * inv_freq));
        }
    }
    const Memory<Bfloat16> before{made.rows, made.cache};
    for (std::int64_t token = 0; token < 3; ++token) CHECK((place_token<Bfloat16, 8>(made.params, token)));
    const Memory<Bfloat16> after{made.rows, made.cache};
    CHECK(after != before);
    std::copy(before.first.begin(), before.first.end(), made.rows.begin());
    std::copy(before.second.begin(), before.second.end(), made.cache.begin());
    made.params.inv_freq = 0;
    made.params.sines = reinterpret_cast<std::uint64_t>(sines.data());
    made.params.cosines = reinterpret_cast<std::uint64_t>(cosines.data());
    made.params.num_positions = kPositions;
    emulated::launch(3, kScatterThreads, [&] { hcache_rope_scatter_bfloat16(made.params); });
    CHECK(made.rows == after.first && made.cache == after.second);
}

void vectors_are_chosen_where_everything_is_aligned() {
    const Case<Float16> made(2, 2, 64, 64, true);
    CHECK(fits_vectors(made.params, 2, 8));
    for (const auto address : {&RopeScatter::rows, &RopeScatter::cache, &RopeScatter::q_gamma, &RopeScatter::k_gamma}) {
        RopeScatter shifted = made.params;
        shifted.*address += 8;
        CHECK(!fits_vectors(shifted, 2, 8) && fits_vectors(shifted, 2, 1));
    }
    RopeScatter narrow = made.params;
    narrow.rotary_dim = 24;
    CHECK(!fits_vectors(narrow, 2, 8));
    narrow = made.params;
    narrow.row_stride += 4;
    CHECK(!fits_vectors(narrow, 2, 8));
}

/// The table in rope_scatter.cuh.
void angles_are_right_at_a_million_tokens() {
    for (const std::int64_t last : {4'096, 32'768, 131'072, 1'048'575}) {
        double worst_product = 0, worst_units = 0;
        for (std::int64_t position = last - 500; position <= last; ++position) {
            for (int idx = 0; idx < 64; ++idx) {
                const float inv_freq = 1 / std::pow(10'000.0F, 2 * static_cast<float>(idx) / 128);
                const float angle = multiply_once(static_cast<float>(position), inv_freq);
                worst_product = std::max(worst_product, std::abs(double(position) * double{inv_freq} - double{angle}));
                float sine, cosine;
                turn_by(angle, sine, cosine);
                for (const auto& [got, want] :
                     {std::pair(sine, std::sin(double{angle})), std::pair(cosine, std::cos(double{angle}))}) {
                    const double unit = std::ldexp(1.0, std::ilogb(want) - 23);
                    worst_units = std::max(worst_units, std::abs(double{got} - want) / unit);
                }
            }
        }
        std::printf("   %9ld: product %.5f rad, sine and cosine %.2f units in the last place\n", long{last},
                    worst_product, worst_units);
        CHECK(worst_units < 1);
        CHECK(worst_product < std::ldexp(static_cast<double>(last), -24));
    }
}

}  // namespace

int main() {
    RUN(numbers_round_to_the_nearest_even);
    RUN(heads_are_those_of_torch);
    RUN(a_slot_outside_the_cache_takes_nothing);
    RUN(a_position_outside_the_tables_takes_nothing);
    RUN(angles_may_come_from_tables);
    RUN(vectors_are_chosen_where_everything_is_aligned);
    RUN(angles_are_right_at_a_million_tokens);
}
