// What the stages of a scan by chunks share (chunks.cu).
//
// A unit is eight channels of an image, as many as a thread keeps. Of dense maps it is one channel,
// whose rows are read as eight *pieces*: the pieces of a tile lie side by side, and stand where the
// channels of a tile stand otherwise. A unit is then an eighth as large, so that more of it stays
// in the cache, and no thread idles for want of channels.
#pragma once

#include "cuda/launch.h"

namespace gatedrnn::cuda {

using ChunkSteps = KnownSteps<1>;
constexpr int kPieces = ChunkSteps::kChannels;

// Tickets: for every group the carries of the group before, the sums of this one, and the scans of
// the group before. Each waits for smaller tickets only, as wavefront.h asks for.
struct ChunkPlan {
  int group, groups;  // units in a group; the last one may be smaller
  int chains;         // lines whose states a thread carries: of a unit and direction, at most
  int carries;        // tasks of a unit: a warp of chains each
  int tickets;
  Divisor by_group, by_carries, by_tiles, by_columns;  // tickets of a group; tasks of a unit
};

struct ChunkParams {
  ScanArgs a;
  TilePlan p;
  ChunkPlan plan;
  int channels;  // of the maps whose pieces `a` tells of as its channels; 0: there are no pieces
  int* ticket;
  int *summed, *carried;  // tasks done of each unit
  // Of every chunk of a line its gain, and its offset until the state is there that enters it.
  Borders<float> gains, states;
};

// For all threads: a unit's counter has come to `count`.
GATEDRNN_DEVICE void wait_count(const int* counter, int count) {
  if (threadIdx.x == 0) wait_for(counter, count);
  meet<ChunkSteps>();
}
// For all threads: what they have written is there.
GATEDRNN_DEVICE void count_one(int* counter) {
  meet<ChunkSteps>();
  if (threadIdx.x == 0) add_release(counter, 1);
}

}  // namespace gatedrnn::cuda
