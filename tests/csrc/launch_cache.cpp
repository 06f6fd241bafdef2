// Threads that launch side by side on several devices, with a driver that counts what it is asked.
#include "core/launch_cache.h"

#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

constexpr int kDevices = 70, kThreads = 8, kRounds = 2000;  // some devices past those that are kept

struct Driver {
    std::atomic<int> num_asked{0}, num_wrong{0};
    std::array<std::atomic<size_t>, 2 * kDevices> limits{};  // of two kernels
};

void launch_often(dsc::DeviceValues& values, dsc::SharedLimits& limits, Driver& driver, int thread) {
    for (int round = 0; round < kRounds; ++round) {
        const int device = (round + thread) % kDevices, which = round % 2 * kDevices + device;
        const int value = values.get(device, [&] {
            ++driver.num_asked;
            return 3 * device;
        });
        const size_t num_bytes = 1000 + 100 * static_cast<size_t>((round / kDevices + thread) % 5);
        limits.raise(&driver.limits[round % 2], device, num_bytes, [&] { driver.limits[which] = num_bytes; });
        driver.num_wrong += value != 3 * device or driver.limits[which] < num_bytes;
    }
}

bool stays_unset_when_refused() {
    dsc::SharedLimits limits;
    int num_set = 0;
    try {
        limits.raise(&num_set, 0, 100, [] { throw std::runtime_error("refused"); });
    } catch (const std::runtime_error&) {
        limits.raise(&num_set, 0, 100, [&] { ++num_set; });
        limits.raise(&num_set, 0, 90, [&] { ++num_set; });
    }
    return num_set == 1;
}

}  // namespace

int main() {
    dsc::DeviceValues values;
    dsc::SharedLimits limits;
    Driver driver;
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreads; ++thread) {
        threads.emplace_back([&, thread] { launch_often(values, limits, driver, thread); });
    }
    for (std::thread& thread : threads) thread.join();
    const int num_before = driver.num_asked;
    values.get(5, [&] { return driver.num_asked++; });  // kept
    std::printf("%d wrong, %d asked again, refused %s\n", driver.num_wrong.load(),
                driver.num_asked - num_before, stays_unset_when_refused() ? "right" : "wrong");
}
