// Copies by several threads equal plain ones.
#include <algorithm>
#include <cstring>
#include <random>

#include "../io/copier.hpp"
#include "../io/slab.hpp"
#include "check.hpp"

using namespace hcache::io;

namespace {

void copies_are_exact() {
    std::mt19937 random(1);
    for (const unsigned num_threads : {0U, 1U, 2U, 5U}) {
        Copier copier(num_threads);
        const Slab from(4 << 20), to(4 << 20);
        for (std::byte& byte : from.bytes()) byte = static_cast<std::byte>(random());
        std::vector<std::byte> model(to.bytes().size());
        for (int round = 0; round < 10; ++round) {
            std::vector<Copy> copies;
            for (std::size_t at = random() % 1000; at < model.size();) {
                const std::size_t length = std::min<std::size_t>(random() % 700'000, model.size() - at);
                const std::size_t source = random() % (from.bytes().size() - length + 1);
                copies.push_back({to.bytes().data() + at, from.bytes().data() + source, length});
                std::memcpy(model.data() + at, from.bytes().data() + source, length);
                at += length + random() % 1000;
            }
            copier.run(copies);
            CHECK(std::equal(model.begin(), model.end(), to.bytes().begin()));
        }
        copier.run({});
    }
}

void several_callers_do_not_mix() {
    Copier copier(3);
    std::vector<std::thread> callers;
    for (unsigned own = 0; own < 4; ++own) {
        callers.emplace_back([&copier, own] {
            std::vector<std::byte> from(2 << 20), to(2 << 20);
            for (unsigned round = 0; round < 20; ++round) {
                std::fill(from.begin(), from.end(), static_cast<std::byte>(own * 20 + round));
                const Copy copy{to.data(), from.data(), from.size()};
                copier.run({&copy, 1});
                CHECK(to == from);
            }
        });
    }
    for (auto& caller : callers) caller.join();
}

}  // namespace

int main() {
    RUN(copies_are_exact);
    RUN(several_callers_do_not_mix);
}
