// How a scan is cut into tasks.
//
// A *pass* crosses the image diagonally. From the top left it serves left_to_right and
// top_to_bottom, from the bottom right the other two directions. A task is one tile of one pass,
// with as many channels as fit. It needs the carries of the two tiles before it.
#pragma once

#include <climits>
#include <cmath>

#include "cuda/runtime.cuh"
#include "recurrence.h"

namespace gatedrnn::cuda {

constexpr int kAxes = 2;  // rows (along the width), then columns
constexpr int kPasses = 2;

// Numbers of tiles and tasks have 32 bits: a GPU divides 64-bit numbers slowly.
struct Cell {
  int row, column;
};

// Divides numbers below 2^31 by a fixed number, with a multiplication (Granlund and Montgomery
// 1994). A GPU has no instruction for division, and needs about twenty others.
struct FastDivisor {
  unsigned by = 1, factor = 1, shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(int by) : by(by) {
    while ((1u << shift) < this->by) ++shift;
    factor = static_cast<unsigned>((((uint64_t{1} << shift) - this->by) << 32) / this->by + 1);
  }
  GATEDRNN_INLINE unsigned quotient(unsigned n) const {
    return (static_cast<unsigned>(uint64_t{n} * factor >> 32) + n) >> shift;
  }
};

// Cell number `order` of a grid, antidiagonal by antidiagonal from the top left. Cells of an
// antidiagonal do not depend on each other. `shorter` is the smaller of rows and columns.
GATEDRNN_INLINE Cell diagonal_cell(unsigned order, unsigned rows, unsigned columns,
                                   const FastDivisor& shorter) {
  const unsigned least = shorter.by, most = rows < columns ? columns : rows;
  // A growing triangle, full antidiagonals, and the first triangle turned around.
  const unsigned corner = least * (least + 1) / 2, middle = (most - least) * least;
  const bool turned = order >= corner + middle;
  if (turned) order = rows * columns - 1 - order;
  unsigned diagonal, along;
  if (order < corner) {
    diagonal = static_cast<unsigned>((sqrtf(8 * static_cast<float>(order) + 1) - 1) / 2);
    while (diagonal * (diagonal + 1) / 2 > order) --diagonal;  // the root was rounded
    while ((diagonal + 1) * (diagonal + 2) / 2 <= order) ++diagonal;
    along = order - diagonal * (diagonal + 1) / 2;
  } else {
    const unsigned whole = shorter.quotient(order - corner);
    diagonal = least + whole;
    along = order - corner - whole * least + (rows < columns ? diagonal - rows + 1 : 0);
  }
  const Cell cell{static_cast<int>(diagonal - along), static_cast<int>(along)};
  return turned ? Cell{static_cast<int>(rows) - 1 - cell.row,
                       static_cast<int>(columns) - 1 - cell.column}
                : cell;
}

// Two passes store their parts of a tile in the same place. The first writes, and the second adds
// or compares. Both operations commute, so either order gives the same bits.
enum Visit { kOnly, kFirst, kSecond };

struct Task {
  int pass;
  Visit visit;        // first or second, in the order of the tickets
  bool from_end;      // whether lines run from the bottom right
  int unit;           // image and channel tile
  int64_t n, c0;      // image, first channel
  int channels;       // in this tile
  Cell cell;          // in the grid of tiles
  int rows, columns;  // pixels of this tile; fewer than `side` at the lower and right edges
};

struct TilePlan {
  int side, channels;  // of a tile: pixels, channels
  int pitch;           // columns from one tile to the next: `side`, except in chunks.cu
  int64_t height, width, all_channels;
  int tile_rows, tile_columns, channel_tiles, units;
  int group;  // units that advance together; the next group follows
  int passes;
  // Tickets and units are divided by these.
  FastDivisor by_group;           // tickets of a group
  FastDivisor by_units;           // units of a group
  FastDivisor by_last_units;      // units of the last group
  FastDivisor by_channel_tiles;   // units of an image
  FastDivisor by_shorter;         // tiles of the longest antidiagonal
  bool from_end[kPasses];         // of each pass
  int direction[kPasses][kAxes];  // index in the caller's list, or -1
  Direction walks[kDirections];   // the caller's list
  int tasks;

  GATEDRNN_INLINE int tiles() const { return tile_rows * tile_columns; }

  // Enough units to keep `blocks` busy twice. More would spread the active maps beyond the L2
  // cache.
  void advance_together(int blocks) {
    const int wide = std::max(passes * tiles() / (tile_rows + tile_columns - 1), 1);
    advance_by(std::clamp((2 * blocks + wide - 1) / wide, 1, units));
  }
  void advance_by(int units_together) {
    group = units_together;
    by_group = FastDivisor(group * tiles() * passes);
    by_units = FastDivisor(group);
    by_last_units = FastDivisor(units % group ? units % group : group);
  }

  // The task of a ticket. Every task comes after those that it waits for. The order is by groups of
  // units, then by antidiagonals, where the two passes alternate.
  GATEDRNN_INLINE Task task(int ticket) const {
    const int groups_before = by_group.quotient(ticket), first = groups_before * group;
    const FastDivisor& members = units - first < group ? by_last_units : by_units;
    const int rest = ticket - groups_before * static_cast<int>(by_group.by);
    const int step = members.quotient(rest), member = rest - step * static_cast<int>(members.by);
    const int pass = step & (passes - 1), order = step >> (passes - 1);
    const int mirrored = tiles() - 1 - order;  // its number in the other pass
    Cell cell = diagonal_cell(order, tile_rows, tile_columns, by_shorter);
    if (from_end[pass]) cell = {tile_rows - 1 - cell.row, tile_columns - 1 - cell.column};
    Task t = task(first + member, cell);
    t.pass = pass;
    t.from_end = from_end[pass];
    if (passes == 2)
      t.visit = order < mirrored || (order == mirrored && pass == 0) ? kFirst : kSecond;
    return t;
  }
  GATEDRNN_INLINE int channel_tile(int unit) const {
    return unit - static_cast<int>(by_channel_tiles.quotient(unit)) * channel_tiles;
  }
  // A tile without a pass.
  GATEDRNN_INLINE Task task(int unit, Cell cell) const {
    Task t{};
    t.unit = unit;
    t.cell = cell;
    t.n = by_channel_tiles.quotient(unit);
    t.c0 = int64_t{channel_tile(unit)} * channels;
    t.channels = part(all_channels, t.c0, channels);
    t.rows = part(height, int64_t{cell.row} * side, side);
    t.columns = part(width, int64_t{cell.column} * side, side);
    return t;
  }

  // The previous tile along an axis.
  GATEDRNN_INLINE Cell upstream(Cell cell, int axis, bool backwards) const {
    const int to = backwards ? 1 : -1;  // a reference would move it to memory
    return {cell.row + axis * to, cell.column + (1 - axis) * to};
  }
  GATEDRNN_INLINE bool inside(Cell cell) const {
    return cell.row >= 0 && cell.row < tile_rows && cell.column >= 0 && cell.column < tile_columns;
  }
  GATEDRNN_INLINE int index(Cell cell) const { return cell.row * tile_columns + cell.column; }

  // Carries of one axis: [unit][tile along the line][line][channel]. Lines and channels are padded
  // to whole tiles. border() is the place of a tile's carries.
  GATEDRNN_INLINE int64_t border_size() const {
    return int64_t{tiles()} * side * channels;
  }  // of one unit
  GATEDRNN_INLINE int64_t border(int unit, Cell cell, int axis) const {
    const int place =
        axis == 0 ? cell.column * tile_rows + cell.row : cell.row * tile_columns + cell.column;
    return unit * border_size() + int64_t{place} * side * channels;
  }

 private:
  static GATEDRNN_INLINE int part(int64_t size, int64_t begin, int most) {
    return static_cast<int>(size - begin < most ? size - begin : most);
  }
};

// Cuts the maps of `a` into tiles.
inline TilePlan plan_tiles(const ScanArgs& a, int side, int channels) {
  TilePlan p{};
  p.side = side;
  p.channels = channels;
  p.pitch = side;
  p.height = a.h, p.width = a.w, p.all_channels = a.c;
  const int64_t rows = ceil_div(a.h, side), columns = ceil_div(a.w, side);
  const int64_t channel_tiles = ceil_div(a.c, channels), units = a.n * channel_tiles;
  if (rows * columns >
      (INT_MAX - (1 << 20)) / units / kPasses)  // a block draws one ticket more than it uses
    throw std::runtime_error("gatedrnn: the maps have more tiles than a call on a GPU can count");
  p.tile_rows = static_cast<int>(rows), p.tile_columns = static_cast<int>(columns);
  p.channel_tiles = static_cast<int>(channel_tiles), p.units = static_cast<int>(units);
  for (const bool from_end : {false, true}) {
    int found[kAxes] = {-1, -1};
    for (int i = 0; i < a.directions; ++i) {
      const Direction& direction = kDirectionTable[a.direction[i]];
      p.walks[i] = direction;
      if (direction.reverse == from_end) found[direction.along_width ? 0 : 1] = i;
    }
    if (found[0] < 0 && found[1] < 0) continue;
    p.from_end[p.passes] = from_end;
    for (int axis = 0; axis < kAxes; ++axis) p.direction[p.passes][axis] = found[axis];
    ++p.passes;
  }
  p.tasks = p.units * p.tiles() * p.passes;
  p.by_channel_tiles = FastDivisor(p.channel_tiles);
  p.by_shorter = FastDivisor(std::min(p.tile_rows, p.tile_columns));
  p.advance_by(p.units);
  return p;
}

}  // namespace gatedrnn::cuda
