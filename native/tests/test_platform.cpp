#include <cfenv>
#include <cstring>
#include <thread>

#include "../bandwidth.h"
#include "../platform.h"
#include "check.h"

using namespace bitllm;

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
