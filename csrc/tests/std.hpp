// What nearly every source here includes of the library, compiled once for all of them (see the Makefile): reading it
// takes longer than compiling what stands behind it. Sources include what they use all the same; the package's own
// build knows nothing of this.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>
