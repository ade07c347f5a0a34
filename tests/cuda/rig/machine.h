// Cards made of host memory and threads: what lies behind the entry points of the runtime and the driver.
//
// One mutex guards all state; the work of streams runs without it. Handles are numbers that are never used again, so a
// handle of something destroyed is found to be one. The machine lives as long as the process, since work of detached
// streams may still run while the process ends.
#pragma once
#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace rig {

constexpr int kMaxPeers = 8;  // CUDA's limit where no NVSwitch is
constexpr std::size_t kPage = 4096, kAlignment = 512;

struct Stream;

// A node of a graph: its work may run any number of times, after the nodes of these numbers.
struct Node {
    std::function<int()> work;
    std::vector<int> after;
};

struct Graph {
    int card = 0;
    std::vector<Node> nodes;
};

// A recording that streams take part in: the one where it began, and those that waited for its events.
struct Capture {
    Graph graph;
    Stream* origin = nullptr;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    std::thread::id thread;
    bool valid = true, over = false;
};

// A point in a stream's work: done once all before it has run.
struct Marker {
    bool done = false;
    double seconds = 0;            // when, by the host's clock
    std::vector<Stream*> waiters;  // streams to wake
};
using Point = std::shared_ptr<Marker>;

// One item of a stream's queue. It runs when `after` is done; `work` returns an error that breaks the card, or 0.
struct Item {
    std::function<int()> work;
    std::vector<Point> after;
    Point done = std::make_shared<Marker>();
};

struct Stream {
    int card = 0;
    unsigned flags = 0;
    int priority = 0;
    bool closed = false;
    std::deque<Item> queue;
    Point tail;  // of the item enqueued last
    std::shared_ptr<Capture> capture;  // while the stream records
    std::vector<int> ends;             // the nodes behind which its next one comes
    std::condition_variable wake;
    std::minstd_rand random;
};

struct Event {
    int card = 0;
    unsigned flags = 0;
    Point last;  // null until recorded
    std::shared_ptr<Capture> capture;  // if it was last recorded into a recording, behind these nodes
    std::vector<int> ends;
};

enum class Kind { device, pinned };

struct Allocation {
    std::uintptr_t base = 0;
    std::size_t nbytes = 0, mapped = 0;
    std::uintptr_t mapping = 0;
    int card = 0;
    Kind kind = Kind::device;
    bool live = true;
};

struct Card {
    bool context = false;  // whether the primary context exists
    int broken = 0;        // an error that every later call returns
    std::size_t used = 0;
    std::vector<bool> reaches;             // peers whose memory kernels of this card may use
    std::shared_ptr<Stream> legacy;        // the default stream
    std::vector<std::weak_ptr<Stream>> all;  // including destroyed ones that still have work
};

// Ranks that meet in collectives: how many each has come to, and how many have come to each that lacks some.
struct Group {
    std::map<int, int> turns, come;
};

// A graph that can be launched. Two launches of one never run at the same time.
struct Launchable {
    Graph graph;
    Point last;
};

struct Module {
    int card;
    std::string image;
};

struct Function {
    int card;
    std::string name;
    std::vector<std::size_t> sizes;  // bytes of each parameter, by the image
};

struct Machine {
    std::mutex mutex;
    std::condition_variable finished;  // any marker is done
    std::vector<Card> cards;
    std::map<std::uintptr_t, Allocation> memory;  // by base; freed ranges stay, and are never used again
    std::map<std::uintptr_t, std::shared_ptr<Stream>> streams;
    std::map<std::uintptr_t, std::shared_ptr<Event>> events;
    std::map<std::uintptr_t, Graph> graphs;
    std::map<std::uintptr_t, Launchable> launchable;
    std::map<std::uintptr_t, std::pair<std::uintptr_t, int>> nodes;  // the graph of a node, and its number there
    std::vector<std::weak_ptr<Capture>> captures;
    std::map<std::uintptr_t, Module> modules;
    std::map<std::uintptr_t, Function> functions;
    std::uintptr_t next_handle = 0x7000'0000'1000;
    std::size_t card_nbytes = 0;
    unsigned delay_microseconds = 0;
    bool held = false;  // while it is no work begins
    bool started = false, eager = false;  // CUDA reads CUDA_MODULE_LOADING when it starts
    unsigned seed = 0, query_milliseconds = 0, hold_milliseconds = 0;
    std::vector<std::pair<int, int>> apart, falsely;  // pairs of cards without peer access, and with one that does not work
    std::map<std::uintptr_t, Group> groups;                      // of ranks that meet in collectives
    int lonely = 0, held_queries = 0;  // collectives that some ranks have come to and not all; queries that waited for it
    int unmet = 0;  // collectives that some of their ranks have been enqueued for, and not all

    std::uintptr_t handle() { return next_handle += 16; }
};

using Lock = std::unique_lock<std::mutex>;

Machine& machine();

// What CUDA forbids and does not detect: written to standard error and to the file RIG_VIOLATIONS.
void violation(const std::string& what);

// What the first call of CUDA does.
void start_cuda(const Lock&);

// Threads: the current card, and whether a context is current (a thread new to CUDA has none).
int current_card();
bool has_context();
void set_card(int card);
// How many groups of NCCL's this thread has begun.
int& group_depth();
// Calls that wait are violations inside a group, and calls that wait for all cards while a collective lacks ranks.
void check_wait(const Lock&, const char* name, bool for_all_cards);
// Makes the current card's context exist and current, as the runtime's calls do.
void enter_context(const Lock&);

// Memory.
Allocation* find(const Lock&, std::uintptr_t address, bool freed = false);
int allocate(Lock&, void** address, std::size_t nbytes, Kind kind);
int release(Lock&, void* address, Kind kind);

// Streams. A handle of 0 or cudaStreamLegacy is the default stream of the current card.
std::shared_ptr<Stream> stream_of(const Lock&, cudaStream_t handle);
std::shared_ptr<Stream> make_stream(const Lock&, int card, unsigned flags, int priority);
Point enqueue(const Lock&, Stream& stream, std::function<int()> work, std::vector<Point> after = {});
void wait(Lock&, const Point& point);
void wait_for_card(Lock&, int card);
std::shared_ptr<Event> event_of(const Lock&, cudaEvent_t handle);
double now();

// Recordings. A call that must not be made while one is under way (by this thread, or by any in the global mode) makes
// it invalid; returns the error to answer with, or 0.
int refuse_while_recording(const Lock&);
int invalidate(Capture& capture, int error);
// The default stream must not be used while a stream records that waits for it.
int refuse_default_stream(const Lock&, const Stream& stream);
int wait_in_recording(const Lock&, Stream& stream, const Event& event);

}  // namespace rig
