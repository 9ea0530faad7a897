// From rows of a QKV or KV projection to one layer's K and V in blocks: an RMS norm of each head where the model has
// one (Qwen3), rotary embedding at absolute positions, and the place in the cache, in one pass. The arithmetic of the
// kernel (rope_scatter.cu), which g++ compiles, too.
//
// Rounding is that of the engine's torch modules (norm.py, rope.py): statistics, angles and turns in float32, one
// rounding to the rows' own type behind each of  x * rsqrt(mean(x^2) + eps),  gamma * that,  and the turn.
//
// An angle is the float32 product  position * inv_freq,  as in the torch modules and in transformers: a product in
// double would be closer to the mathematical angle and farther from what models were trained and served with. What
// matters is that sine and cosine are right for the angle that there is. Greatest errors, against double, of turns by
// inv_freq = 10000^(-2i/128):
//
//     position                          4,096     32,768    131,072   1,048,575
//     float32 product, radians          0.00012   0.00098   0.0039    0.031       as models were trained
//     sine and cosine, last places      0.56      0.56      0.56      0.56        glibc; CUDA promises 2
//     __sincosf, absolute               0.0002    0.002     0.008     0.06        |angle| * 2^-24, estimated: not used
#pragma once

#include <cstdint>
#include <cstring>

#include "anywhere.cuh"
#include "numbers.cuh"

namespace hcache::gpu {

inline constexpr unsigned kScatterThreads = 128;
inline constexpr unsigned kLanes = 32;
inline constexpr unsigned kMaxRotaryPairs = 256;
/// What one thread loads or stores at a time where everything is aligned to it.
inline constexpr unsigned kVectorBytes = 16;

/// One launch. Addresses are of the GPU's memory; strides and sizes count elements, all of one type but where said.
struct RopeScatter {
    /// [num_tokens, (num_heads + 2 * num_kv_heads) * head_size], rows `row_stride` apart: q, then k, then v. q is
    /// normed and rotated where it lies; k and v are only read. A restore has no q: num_heads is 0.
    std::uint64_t rows;
    /// [num_slots, 2, num_kv_heads, head_size], contiguous: all blocks of one layer.
    std::uint64_t cache;
    /// Angles, one of two ways. [num_positions, rotary_dim / 2] each, float32: what the CPU worked out once, the same
    /// bits on every device. Or null, and inv_freq is [rotary_dim / 2], float32: nothing to read but that, worked out
    /// here.
    std::uint64_t sines;
    std::uint64_t cosines;
    std::uint64_t inv_freq;
    /// [num_tokens], int64: absolute positions, and rows of the cache. No two tokens share a slot. A slot that is not
    /// in the cache, or a position that is not in the tables, ends the context (trap): what would be overwritten is
    /// another's.
    std::uint64_t positions;
    std::uint64_t slots;
    /// [head_size] each, or 0: not normed.
    std::uint64_t q_gamma;
    std::uint64_t k_gamma;
    std::int64_t num_tokens;
    std::int64_t num_slots;
    std::int64_t num_positions;
    std::int64_t row_stride;
    std::uint32_t num_heads;
    std::uint32_t num_kv_heads;
    std::uint32_t head_size;
    /// Even; the first so many elements of a head turn, i with i + rotary_dim / 2. 0: none.
    std::uint32_t rotary_dim;
    float eps;
    std::uint32_t unused;
};

template <typename Element>
HCACHE_ANYWHERE inline Element* at(std::uint64_t address) {
    return reinterpret_cast<Element*>(address);
}

/// Sine and cosine of pair `idx` of a token's heads.
HCACHE_ANYWHERE inline void turn_of(const RopeScatter& params, std::int64_t token, unsigned idx, float& sine,
                                    float& cosine) {
    const std::int64_t position = at<const std::int64_t>(params.positions)[token];
    if (params.sines != 0) {
        const std::int64_t entry = position * (params.rotary_dim / 2) + idx;
        sine = at<const float>(params.sines)[entry];
        cosine = at<const float>(params.cosines)[entry];
        return;
    }
    turn_by(multiply_once(static_cast<float>(position), at<const float>(params.inv_freq)[idx]), sine, cosine);
}

/// Whether a token's slot is in the cache, and its position in the tables where there are any.
HCACHE_ANYWHERE inline bool is_sound(const RopeScatter& params, std::int64_t token) {
    const std::int64_t slot = at<const std::int64_t>(params.slots)[token];
    const std::int64_t position = at<const std::int64_t>(params.positions)[token];
    const bool has_turn = params.sines == 0 || (position >= 0 && position < params.num_positions);
    return has_turn && slot >= 0 && slot < params.num_slots;
}

/// One head of a token: where it comes from, where it goes to, and its gamma (null: not normed).
template <typename Number>
struct Head {
    const typename Number::Bits* from;
    typename Number::Bits* to;
    const typename Number::Bits* gamma;
};

/// Heads of q, then of k.
template <typename Number>
HCACHE_ANYWHERE inline Head<Number> head_of(const RopeScatter& params, std::int64_t token, std::int64_t slot,
                                            unsigned idx) {
    using Bits = typename Number::Bits;
    auto* const row = at<Bits>(params.rows) + token * params.row_stride;
    auto* const from = row + std::int64_t{idx} * params.head_size;
    if (idx < params.num_heads) return {from, from, at<const Bits>(params.q_gamma)};
    const std::int64_t place = (slot * 2 * params.num_kv_heads + (idx - params.num_heads)) * params.head_size;
    return {from, at<Bits>(params.cache) + place, at<const Bits>(params.k_gamma)};
}

/// All heads of v, one behind the other in the row and in the cache; not normed, never turned.
template <typename Number>
HCACHE_ANYWHERE inline Head<Number> values_of(const RopeScatter& params, std::int64_t token, std::int64_t slot) {
    using Bits = typename Number::Bits;
    const std::int64_t num_before = std::int64_t{params.num_heads} + params.num_kv_heads;
    const std::int64_t place = (slot * 2 + 1) * params.num_kv_heads * params.head_size;
    return {at<const Bits>(params.rows) + token * params.row_stride + num_before * params.head_size,
            at<Bits>(params.cache) + place, nullptr};
}

/// Read and written in one go, over memory of any type.
template <typename Number, unsigned kCount>
struct alignas(sizeof(typename Number::Bits) * kCount) [[gnu::may_alias]] Vector {
    typename Number::Bits of[kCount];
};

/// What threads do to a head of k or q. `kCount` elements at a time: each unit of work is one vector that passes, or
/// two that turn into each other; nobody else reads or writes its elements, so that q may be turned where it lies.
template <typename Number, unsigned kCount>
struct Turning {
    using Bits = typename Number::Bits;
    using Elements = Vector<Number, kCount>;

    HCACHE_ANYWHERE explicit Turning(const RopeScatter& params)
        : half(params.rotary_dim / 2),
          head_size(params.head_size),
          num_pairs(half / kCount),
          num_units(num_pairs + (head_size - 2 * half) / kCount),
          eps(params.eps) {}

    /// Threads that share a head: a power of two, one warp at most.
    HCACHE_ANYWHERE unsigned num_lanes() const {
        unsigned lanes = 1;
        while (lanes < num_units && lanes < kLanes) lanes *= 2;
        return lanes;
    }

    /// A lane's part of the sum of a head's squares. The parts add up in a tree: lane with lane ^ n/2, ... lane ^ 1.
    HCACHE_ANYWHERE float squares(const Head<Number>& head, unsigned lane, unsigned lanes) const {
        float sum = 0;
        for (unsigned unit = lane; unit < num_units; unit += lanes) {
            add_squares(sum, load(head.from + start_of(unit)));
            if (unit < num_pairs) add_squares(sum, load(head.from + half + start_of(unit)));
        }
        return sum;
    }

    /// What a head is multiplied by, of the sum of its squares.
    HCACHE_ANYWHERE float scale_of(float sum) const {
        const float mean = divide_once(sum, static_cast<float>(head_size));
        return divide_once(1.0F, root_of(add_once(mean, eps)));
    }

    /// A lane's part of a head, to its place. sines, cosines: [half].
    HCACHE_ANYWHERE void place(const Head<Number>& head, unsigned lane, unsigned lanes, float scale, const float* sines,
                               const float* cosines) const {
        for (unsigned unit = lane; unit < num_units; unit += lanes) {
            const unsigned start = start_of(unit);
            Elements low = load_normed(head, start, scale);
            if (unit < num_pairs) {
                Elements high = load_normed(head, half + start, scale);
                for (unsigned idx = 0; idx < kCount; ++idx) {
                    const float x = Number::widen(low.of[idx]), y = Number::widen(high.of[idx]);
                    const float sine = sines[start + idx], cosine = cosines[start + idx];
                    low.of[idx] = Number::narrow(add_once(multiply_once(x, cosine), multiply_once(-y, sine)));
                    high.of[idx] = Number::narrow(add_once(multiply_once(y, cosine), multiply_once(x, sine)));
                }
                store(head.to + half + start, high);
            }
            store(head.to + start, low);
        }
    }

    HCACHE_ANYWHERE static Elements load(const Bits* from) { return *reinterpret_cast<const Elements*>(from); }
    HCACHE_ANYWHERE static void store(Bits* to, const Elements& elements) {
        *reinterpret_cast<Elements*>(to) = elements;
    }

    unsigned half, head_size, num_pairs, num_units;
    float eps;

  private:
    /// Element where a unit begins: in the first half of what turns, or behind both.
    HCACHE_ANYWHERE unsigned start_of(unsigned unit) const {
        return unit < num_pairs ? unit * kCount : 2 * half + (unit - num_pairs) * kCount;
    }

    HCACHE_ANYWHERE static void add_squares(float& sum, const Elements& elements) {
        for (unsigned idx = 0; idx < kCount; ++idx) {
            const float x = Number::widen(elements.of[idx]);
            sum = add_once(sum, multiply_once(x, x));
        }
    }

    HCACHE_ANYWHERE static Elements load_normed(const Head<Number>& head, unsigned start, float scale) {
        Elements elements = load(head.from + start);
        if (head.gamma == nullptr) return elements;
        const Elements gamma = load(head.gamma + start);
        for (unsigned idx = 0; idx < kCount; ++idx) {
            const auto scaled = Number::narrow(multiply_once(Number::widen(elements.of[idx]), scale));
            elements.of[idx] = Number::narrow(multiply_once(Number::widen(gamma.of[idx]), Number::widen(scaled)));
        }
        return elements;
    }
};

/// Whether everything is aligned to vectors of `count` elements of `element_bytes`.
inline bool fits_vectors(const RopeScatter& params, unsigned element_bytes, unsigned count) {
    const std::uint64_t addresses = params.rows | params.cache | params.q_gamma | params.k_gamma;
    const std::uint64_t sizes =
        params.rotary_dim / 2 | params.head_size | static_cast<std::uint64_t>(params.row_stride);
    return addresses % (std::uint64_t{element_bytes} * count) == 0 && sizes % count == 0;
}

/// A token as the kernel's threads do it, one after the other on the CPU. False, and nothing done, when it is not
/// sound.
template <typename Number, unsigned kCount>
bool place_token(const RopeScatter& params, std::int64_t token) {
    using Bits = typename Number::Bits;
    const std::int64_t slot = at<const std::int64_t>(params.slots)[token];
    if (!is_sound(params, token)) return false;
    float sines[kMaxRotaryPairs], cosines[kMaxRotaryPairs];
    for (unsigned idx = 0; idx < params.rotary_dim / 2; ++idx) turn_of(params, token, idx, sines[idx], cosines[idx]);
    const Turning<Number, kCount> turning(params);
    const unsigned lanes = turning.num_lanes();
    for (unsigned idx = 0; idx < params.num_heads + params.num_kv_heads; ++idx) {
        const Head<Number> head = head_of<Number>(params, token, slot, idx);
        float parts[kLanes] = {};
        for (unsigned lane = 0; lane < lanes; ++lane) parts[lane] = turning.squares(head, lane, lanes);
        for (unsigned offset = lanes / 2; offset != 0; offset /= 2) {
            for (unsigned lane = 0; lane < offset; ++lane) parts[lane] = add_once(parts[lane], parts[lane + offset]);
        }
        const float scale = turning.scale_of(parts[0]);
        for (unsigned lane = 0; lane < lanes; ++lane) turning.place(head, lane, lanes, scale, sines, cosines);
    }
    const Head<Number> values = values_of<Number>(params, token, slot);
    std::memcpy(values.to, values.from, std::size_t{params.num_kv_heads} * params.head_size * sizeof(Bits));
    return true;
}

}  // namespace hcache::gpu
