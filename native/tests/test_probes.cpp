#include <stdexcept>

#include "../bandwidth.h"
#include "../dispatch.h"
#include "../probes.h"
#include "../stage_clock.h"
#include "check.h"

using namespace bitllm;
using namespace bitllm::testing;

TEST(every_kernel_set_has_a_peak_that_counts_what_it_does) {
    for (const Kernels* kernels : available_kernels()) {
        const int64_t one = kernels->integer->peak(1);
        CHECK_WITH(one >= 500 && one <= 20000, kernels->name << " " << one);
        CHECK_WITH(kernels->integer->peak(7) == 7 * one, kernels->name);
        CHECK_WITH(peak_multiplications(*kernels, 1) > 1e6, kernels->name);
    }
}

TEST(quantised_operations_run_in_every_packing) {
    for (const Kernels* kernels : available_kernels())
        for (const Packing packing : {Packing::TWO_BIT, Packing::BASE3})
            CHECK_WITH(quantized_operations(*kernels, packing, 2, 33, 300, 1e-4) > 1,
                       kernels->name);
}

TEST(operations_that_cannot_be_are_refused) {
    const Kernels& kernels = best_kernels();
    const auto refused = [&](int threads, size_t rows, size_t columns) {
        return throws<std::invalid_argument>(
            [&] { quantized_operations(kernels, Packing::TWO_BIT, threads, rows, columns, 1e-4); });
    };
    CHECK(refused(1, 0, 8) && refused(1, 8, 0) && refused(0, 8, 8));
    CHECK(refused(1, 1, (size_t{1} << 24) / 127 + 1));
    CHECK(throws<std::invalid_argument>([&] { peak_multiplications(kernels, 0); }));
}

TEST(bandwidth_of_any_size_is_measured) {
    for (const size_t bytes : {size_t{0}, size_t{1}, size_t{65}, size_t{1} << 20})
        for (const int threads : {1, 2}) CHECK_WITH(read_bandwidth(threads, bytes) > 1e6, bytes);
}

TEST(a_clock_that_is_off_measures_nothing) {
    StageClock clock;
    clock.start();
    clock.lap(Stage::QKV);
    for (const double seconds : clock.spent()) CHECK(seconds == 0);
}

TEST(a_clock_gives_each_stage_the_time_since_the_last) {
    StageClock clock;
    clock.enable(true);
    clock.start();
    volatile size_t work = 0;
    while (work < 100000) work = work + 1;
    clock.lap(Stage::QKV);
    clock.lap(Stage::WAIT);
    const auto spent = clock.spent();
    CHECK(spent[static_cast<size_t>(Stage::QKV)] > 0);
    CHECK(spent[static_cast<size_t>(Stage::HEAD)] == 0);
    clock.enable(false);
    for (const double seconds : clock.spent()) CHECK(seconds == 0);
}
