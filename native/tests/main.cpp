// Runs the native tests: all, or those of the files named as arguments (test_memory, ...).
#include <exception>
#include <filesystem>

#include "check.h"

int main(int count, char** arguments) {
    using namespace bitllm::testing;
    const std::vector<std::string> wanted(arguments + 1, arguments + count);
    int ran = 0, broken = 0;
    for (const Test& test : tests()) {
        const std::string file = std::filesystem::path(test.file).stem().string();
        bool chosen = wanted.empty();
        for (const std::string& name : wanted) chosen = chosen || name == file;
        if (!chosen) continue;
        failures() = 0;
        try {
            test.run();
        } catch (const std::exception& error) {
            fail(test.file, 0, std::string("an exception got out: ") + error.what());
        }
        ++ran;
        broken += failures() > 0;
        std::cout << (failures() ? "FAILED " : "ok     ") << file << " " << test.name;
        if (failures()) std::cout << " (" << failures() << " checks)";
        std::cout << std::endl;
    }
    std::cout << ran << " tests, " << broken << " failed\n";
    return ran == 0 || broken ? 1 : 0;
}
