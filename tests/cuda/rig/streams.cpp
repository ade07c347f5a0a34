// Streams, each a thread that takes one item after the other, and events, which are points in them.
#include <algorithm>
#include <chrono>
#include <thread>

#include "kernels.h"
#include "machine.h"

namespace rig {
namespace {

bool ready(const Item& item) {
    for (const Point& point : item.after) {
        if (!point->done) return false;
    }
    return true;
}

void finish(const Lock&, const Point& point) {
    point->done = true;
    point->seconds = now();
    for (Stream* stream : point->waiters) stream->wake.notify_all();
    point->waiters.clear();
    machine().finished.notify_all();
}

// A stream's thread. It keeps the stream alive until its work is done, also when it is destroyed before.
void serve(std::shared_ptr<Stream> stream) {
    Machine& all = machine();
    Lock lock(all.mutex);
    for (;;) {
        stream->wake.wait(lock, [&] {
            return stream->queue.empty() ? stream->closed : !all.held && ready(stream->queue.front());
        });
        if (stream->queue.empty()) return;
        Item item = std::move(stream->queue.front());
        Card& card = all.cards[stream->card];
        if (item.work && !card.broken) {
            const unsigned most = all.delay_microseconds;
            const unsigned pause = most ? stream->random() % (2 * most) : 0;
            lock.unlock();
            if (pause > most) std::this_thread::sleep_for(std::chrono::microseconds(pause - most));
            const int error = item.work();
            item.work = nullptr;  // what it holds is let go of before anybody is told
            lock.lock();
            if (error && !card.broken) card.broken = error;
        }
        stream->queue.pop_front();
        finish(lock, item.done);
    }
}

void add_waiters(Stream& stream, const Item& item) {
    for (const Point& point : item.after) {
        if (!point->done) point->waiters.push_back(&stream);
    }
}

}  // namespace

void group_ends(std::uintptr_t group) {
    Machine& all = machine();
    Lock lock(all.mutex);
    all.lonely -= static_cast<int>(all.groups[group].come.size());
    all.groups.erase(group);
    all.finished.notify_all();
}

void rank_comes(std::uintptr_t group, int rank, int ranks) {
    Machine& all = machine();
    Lock lock(all.mutex);
    Group& found = all.groups[group];
    const int turn = found.turns[rank]++;
    const int come = ++found.come[turn];
    all.lonely += (come == 1) - (come == ranks);
    if (come == ranks) found.come.erase(turn);
    all.finished.notify_all();
}

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::shared_ptr<Stream> make_stream(const Lock&, int card, unsigned flags, int priority) {
    auto stream = std::make_shared<Stream>();
    stream->card = card;
    stream->flags = flags;
    stream->priority = priority;
    auto& siblings = machine().cards[card].all;
    static unsigned made = 0;
    stream->random.seed(machine().seed * 1009u + ++made);
    siblings.erase(std::remove_if(siblings.begin(), siblings.end(), [](const auto& one) { return one.expired(); }),
                   siblings.end());
    siblings.push_back(stream);
    std::thread(serve, stream).detach();
    return stream;
}

std::shared_ptr<Stream> stream_of(const Lock& lock, cudaStream_t handle) {
    if (handle == nullptr || handle == cudaStreamLegacy) {
        enter_context(lock);
        return machine().cards[current_card()].legacy;
    }
    const auto found = machine().streams.find(reinterpret_cast<std::uintptr_t>(handle));
    return found == machine().streams.end() ? nullptr : found->second;
}

std::shared_ptr<Event> event_of(const Lock&, cudaEvent_t handle) {
    const auto found = machine().events.find(reinterpret_cast<std::uintptr_t>(handle));
    return found == machine().events.end() ? nullptr : found->second;
}

// The default stream waits for all blocking streams of its card, and they for it.
Point enqueue(const Lock&, Stream& stream, std::function<int()> work, std::vector<Point> after) {
    if (stream.capture) {  // recorded, not run
        auto& nodes = stream.capture->graph.nodes;
        nodes.push_back({work ? std::move(work) : [] { return 0; }, stream.ends});
        stream.ends = {static_cast<int>(nodes.size()) - 1};
        return nullptr;
    }
    Card& card = machine().cards[stream.card];
    const auto follow = [&](const Stream* other) {
        if (other && other != &stream && other->tail && !other->tail->done) after.push_back(other->tail);
    };
    if (&stream == card.legacy.get()) {
        for (const auto& other : card.all) {
            const auto alive = other.lock();
            if (alive && !(alive->flags & cudaStreamNonBlocking)) follow(alive.get());
        }
    } else if (!(stream.flags & cudaStreamNonBlocking)) {
        follow(card.legacy.get());
    }
    Item item;
    item.work = std::move(work);
    item.after = std::move(after);
    add_waiters(stream, item);
    stream.tail = item.done;
    stream.queue.push_back(std::move(item));
    stream.wake.notify_all();
    return stream.tail;
}

void wait(Lock& lock, const Point& point) {
    if (point) machine().finished.wait(lock, [&] { return point->done; });
}

void wait_for_card(Lock& lock, int card) {
    std::vector<Point> tails;
    for (const auto& one : machine().cards[card].all) {
        if (const auto stream = one.lock()) tails.push_back(stream->tail);
    }
    for (const Point& tail : tails) wait(lock, tail);
}

}  // namespace rig
