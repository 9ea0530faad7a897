// The smallest of test frameworks: CHECK ends the program with the place and the text of what did not hold.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                        \
        }                                                                        \
    } while (false)

#define RUN(test)                      \
    do {                               \
        test();                        \
        std::printf("ok %s\n", #test); \
    } while (false)
