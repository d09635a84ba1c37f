#include <algorithm>
#include <cfenv>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../bandwidth.h"
#include "../platform.h"
#include "check.h"

using namespace bitllm;

namespace {

// A folder that describes CPUs, as Linux does under /sys/devices/system/cpu.
class CpuFolder {
  public:
    CpuFolder()
        : root_(std::filesystem::temp_directory_path() /
                ("bitllm-cpus-" +
                 std::to_string(std::chrono::steady_clock::now().time_since_epoch().count()))) {}
    ~CpuFolder() { std::filesystem::remove_all(root_); }

    void write(int cpu, const std::string& file, int value) {
        const auto path = root_ / ("cpu" + std::to_string(cpu)) / file;
        std::filesystem::create_directories(path.parent_path());
        std::ofstream(path) << value << "\n";
    }
    void add(int cpu, int package, int core) {
        write(cpu, "topology/physical_package_id", package);
        write(cpu, "topology/core_id", core);
    }
    std::string root() const { return root_.string(); }

  private:
    std::filesystem::path root_;
};

}  // namespace

TEST(cores_are_counted_within_the_cpus) {
    CHECK(physical_cores() >= 1);
    CHECK(physical_cores() <= usable_cpus());
    CHECK(usable_cpus() <= static_cast<int>(std::thread::hardware_concurrency()));
    CHECK(!cpu_name().empty());
}

TEST(memory_figures_make_sense) {
    const size_t available = available_memory();
    CHECK(available > size_t{1} << 20 && available < size_t{1} << 50);
    const size_t before = resident_bytes();
    CHECK(before > 0 && resident_file_bytes() <= before);
    constexpr size_t BYTES = size_t{32} << 20;
    void* pages = map_pages(BYTES);
    CHECK(resident_bytes() < before + BYTES / 2);
    std::memset(pages, 1, BYTES);
    CHECK(resident_bytes() > before + BYTES / 2);
    unmap_pages(pages, BYTES);
    CHECK(resident_bytes() < before + BYTES / 2);
}

TEST(free_memory_of_the_heap_goes_back) {
    constexpr size_t PIECES = 40000, BYTES = 1000;
    std::vector<std::unique_ptr<char[]>> pieces;
    for (size_t i = 0; i < PIECES; ++i) {
        pieces.push_back(std::make_unique<char[]>(BYTES));
        std::memset(pieces.back().get(), 1, BYTES);
    }
    for (size_t i = 0; i + 1 < PIECES; ++i) pieces[i].reset();  // the last one is in the way
    [[maybe_unused]] const size_t before = resident_bytes();
    trim_heap();
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    CHECK(resident_bytes() + PIECES * BYTES / 2 < before);
#endif
    CHECK(pieces.back()[0] == 1);
}

TEST(float_control_is_the_default_inside_and_restored_after) {
    volatile float one = 1.0f, small = 1e-10f;
    std::fesetround(FE_UPWARD);
    {
        FloatControlScope scope;
        CHECK(one + small == 1.0f);
    }
    CHECK(std::fegetround() == FE_UPWARD);
    CHECK(one + small > 1.0f);
    std::fesetround(FE_TONEAREST);
}

TEST(bandwidth_is_measured) {
    CHECK(read_bandwidth(1, size_t{4} << 20) > 1e6);
    CHECK(read_bandwidth(2, 1) > 0);
}

TEST(hardware_threads_of_a_core_count_once) {
    CpuFolder folder;
    for (int cpu = 0; cpu < 8; ++cpu) folder.add(cpu, cpu % 4 / 2, cpu % 2);
    CHECK(fast_cores({0, 1, 2, 3, 4, 5, 6, 7}, folder.root()) == 4);
    CHECK(fast_cores({0, 4}, folder.root()) == 1);
    CHECK(fast_cores({1, 2, 7}, folder.root()) == 3);
    CHECK(fast_cores({}, folder.root()) == 0);
    CHECK(fast_cores({0, 8}, folder.root()) == 0);
}

TEST(slow_cores_count_only_among_themselves) {
    CpuFolder clocked, weighed;
    for (int cpu = 0; cpu < 6; ++cpu) {
        clocked.add(cpu, 0, cpu);
        clocked.write(cpu, "cpufreq/cpuinfo_max_freq", cpu < 1 ? 5700 : cpu < 3 ? 5300 : 4600);
        weighed.add(cpu, 0, cpu);
        weighed.write(cpu, "cpufreq/cpuinfo_max_freq", 2000);
        weighed.write(cpu, "cpu_capacity", cpu < 4 ? 1024 : 512);
    }
    CHECK(fast_cores({0, 1, 2, 3, 4, 5}, clocked.root()) == 3);
    CHECK(fast_cores({3, 4, 5}, clocked.root()) == 3);
    CHECK(fast_cores({0, 1, 2, 3, 4, 5}, weighed.root()) == 4);
    CHECK(fast_cores({4, 5}, weighed.root()) == 2);
}

#if defined(__linux__)
TEST(pages_of_a_file_are_forgotten_and_nothing_else) {
    constexpr size_t BYTES = size_t{8} << 20;
    const auto path = std::filesystem::temp_directory_path() / "bitllm-forgotten-pages";
    std::ofstream(path) << std::string(BYTES, 'x');
    const int file = open(path.c_str(), O_RDWR);
    const auto map = [&](int rights, int kind) {
        void* bytes = mmap(nullptr, BYTES, rights, kind, file, 0);
        CHECK(bytes != MAP_FAILED);
        return static_cast<char*>(bytes);
    };
    char* const shared = map(PROT_READ, MAP_SHARED);
    CHECK(std::count(shared, shared + BYTES, 'x') == BYTES);
    const size_t before = resident_file_bytes();
    forget_pages(shared + 1, BYTES - 1);
    CHECK(resident_file_bytes() + BYTES / 2 < before);
    CHECK(std::count(shared, shared + BYTES, 'x') == BYTES);
    CHECK(resident_file_bytes() + BYTES / 2 > before);
    forget_pages(shared, BYTES + 1);  // more than is mapped
    forget_pages(shared + 1, 10);
    CHECK(resident_file_bytes() + BYTES / 2 > before);

    char* const copied = map(PROT_READ | PROT_WRITE, MAP_PRIVATE);
    std::memset(copied, 'y', BYTES);
    CHECK(mprotect(copied, BYTES, PROT_READ) == 0);
    auto* const own = static_cast<char*>(map_pages(BYTES));
    std::memset(own, 'z', BYTES);
    forget_pages(copied, BYTES);
    forget_pages(own, BYTES);
    forget_pages(nullptr, BYTES);
    CHECK(std::count(copied, copied + BYTES, 'y') == BYTES);
    CHECK(std::count(own, own + BYTES, 'z') == BYTES);
    unmap_pages(own, BYTES);
    munmap(copied, BYTES);
    munmap(shared, BYTES);
    close(file);
    std::filesystem::remove(path);
}
#endif
