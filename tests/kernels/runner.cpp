// Serves one fake CUDA device over stdin and stdout: memory, streams and launches of the compiled kernels.
//
// Commands are one letter and little-endian integers (see host_device.py, the only client):
//   A nbytes lead       allocate; the first `lead` bytes are a guard zone      -> address after the lead
//   W address n data    write                                                 -> 0
//   R address n         read                                                  -> n bytes
//   F address           free; checks the guard zone                           -> 0, or 1 where it was written
//   L launch            enqueue on a stream                                   -> size of the kernel's arguments
//   S                   run all streams, each by its own thread, to the end   -> 0
// The address sanitizer ends the process, with its report on stderr, at the first byte past an allocation.
#include <thread>
#include <unistd.h>
#include <vector>

#include "host_cuda.h"

namespace {

using u64 = unsigned long long;
constexpr unsigned char kGuard = 0xa5, kPoison = 0xcd;

struct Launch {
    unsigned grid, block, mode;
    const host_cuda::Kernel* kernel;
    std::vector<char> args;
};

struct Allocation {
    unsigned char* base;
    u64 lead;
};

void read_all(void* p, std::size_t n) {
    if (n && std::fread(p, 1, n, stdin) != n) std::exit(0);
}

template <class T> T read_value() {
    T value;
    read_all(&value, sizeof value);
    return value;
}

void reply(u64 value) { std::fwrite(&value, sizeof value, 1, stdout); }

void run_thread(const Launch& launch, unsigned block, unsigned thread) {
    gridDim = {launch.grid, 1, 1};
    blockDim = {launch.block, 1, 1};
    blockIdx = {block, 0, 0};
    threadIdx = {thread, 0, 0};
    launch.kernel->call(launch.kernel->function, launch.args.data());
}

void run_block_with_barriers(const Launch& launch, unsigned index) {
    host_cuda::Block shared(launch.block);
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < launch.block; ++thread) {
        threads.emplace_back([&launch, &shared, index, thread] {
            host_cuda::block = &shared;
            run_thread(launch, index, thread);
        });
    }
    for (auto& thread : threads) thread.join();
}

void run(const Launch& launch, unsigned& seed) {
    std::vector<std::thread> blocks;
    for (unsigned block = 0; block < launch.grid; ++block) {
        if (launch.mode == 0) {
            for (unsigned thread = 0; thread < launch.block; ++thread) run_thread(launch, block, thread);
        } else {
            const unsigned delay = rand_r(&seed) % 300;  // ranks and blocks meet in every order
            blocks.emplace_back([&launch, block, delay] {
                usleep(delay);
                run_block_with_barriers(launch, block);
            });
        }
    }
    for (auto& block : blocks) block.join();
}

void synchronize(std::map<unsigned, std::vector<Launch>>& streams) {
    alarm(60);  // a deadlock ends the process instead of hanging the tests
    std::vector<std::thread> workers;
    for (auto& [stream, launches] : streams) {
        workers.emplace_back([&launches, seed = stream + 1]() mutable {
            for (const Launch& launch : launches) run(launch, seed);
        });
    }
    for (auto& worker : workers) worker.join();
    streams.clear();
    alarm(0);
}

void enqueue(std::map<unsigned, std::vector<Launch>>& streams) {
    std::string name(read_value<unsigned>(), ' ');
    read_all(&name[0], name.size());
    Launch launch;
    launch.grid = read_value<unsigned>();
    launch.block = read_value<unsigned>();
    launch.mode = read_value<unsigned>();
    const unsigned stream = read_value<unsigned>();
    launch.args.resize(read_value<unsigned>());
    read_all(launch.args.data(), launch.args.size());
    const auto found = host_cuda::kernels().find(name);
    if (found == host_cuda::kernels().end()) return reply(0);
    launch.kernel = &found->second;
    reply(launch.kernel->args_nbytes);
    if (launch.kernel->args_nbytes == launch.args.size()) streams[stream].push_back(std::move(launch));
}

}  // namespace

int main() {
    std::map<u64, Allocation> allocations;
    std::map<unsigned, std::vector<Launch>> streams;
    for (;;) {
        std::fflush(stdout);
        const char command = read_value<char>();
        if (command == 'A') {
            const u64 nbytes = read_value<u64>(), lead = read_value<u64>();
            auto* base = static_cast<unsigned char*>(std::malloc(lead + nbytes));
            std::memset(base, kGuard, lead);
            std::memset(base + lead, kPoison, nbytes);
            const u64 address = reinterpret_cast<u64>(base) + lead;
            allocations[address] = {base, lead};
            reply(address);
        } else if (command == 'W') {
            const u64 address = read_value<u64>(), nbytes = read_value<u64>();
            read_all(reinterpret_cast<void*>(address), nbytes);
            reply(0);
        } else if (command == 'R') {
            const u64 address = read_value<u64>(), nbytes = read_value<u64>();
            std::fwrite(reinterpret_cast<void*>(address), 1, nbytes, stdout);
        } else if (command == 'F') {
            const Allocation allocation = allocations.at(read_value<u64>());
            u64 damaged = 0;
            for (u64 i = 0; i < allocation.lead; ++i) damaged |= allocation.base[i] != kGuard;
            allocations.erase(reinterpret_cast<u64>(allocation.base) + allocation.lead);
            std::free(allocation.base);
            reply(damaged);
        } else if (command == 'L') {
            enqueue(streams);
        } else if (command == 'S') {
            synchronize(streams);
            reply(0);
        } else {
            std::fprintf(stderr, "unknown command %d\n", command);
            return 2;
        }
    }
}
