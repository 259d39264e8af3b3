// How a scan is cut into tasks: square tiles, visited from one corner or from the opposite one.
//
// A *pass* crosses the image diagonally: from the top left it takes left_to_right and
// top_to_bottom along, from the bottom right the other two. A task is one tile of one pass, of the
// channels that fit in it. It needs the states that leave its two neighbours upstream.
#pragma once

#include <cmath>

#include "cuda/runtime.h"
#include "recurrence.h"

namespace gatedrnn::cuda {

constexpr int kAxes = 2;  // rows (along the width), then columns
constexpr int kPasses = 2;

struct Cell {
  int64_t row, column;
};

// Cell number `order` of a grid, antidiagonal by antidiagonal from the top left: the cells of one
// do not depend on each other.
GATEDRNN_INLINE Cell diagonal_cell(int64_t order, int64_t rows, int64_t columns) {
  const int64_t total = rows * columns, least = rows < columns ? rows : columns;
  const int64_t most = rows < columns ? columns : rows;
  const int64_t corner = least * (least + 1) / 2, middle = (most - least) * least;
  const bool mirrored = order >= corner + middle;
  if (mirrored) order = total - 1 - order;
  Cell cell;
  if (order < corner) {
    auto diagonal = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(order) + 1) - 1) / 2);
    while (diagonal * (diagonal + 1) / 2 > order) --diagonal;
    while ((diagonal + 1) * (diagonal + 2) / 2 <= order) ++diagonal;
    const int64_t along = order - diagonal * (diagonal + 1) / 2;
    cell = {diagonal - along, along};
  } else {
    const int64_t diagonal = least + (order - corner) / least, along = (order - corner) % least;
    cell = rows <= columns ? Cell{rows - 1 - along, diagonal - rows + 1 + along}
                           : Cell{diagonal - along, along};
  }
  return mirrored ? Cell{rows - 1 - cell.row, columns - 1 - cell.column} : cell;
}

struct Task {
  int pass;
  bool from_end;      // of the lines: from the bottom right
  int64_t unit;       // image and channel tile
  int64_t n, c0;      // image, first channel
  int channels;       // in this tile
  Cell cell;          // of the grid of tiles
  int rows, columns;  // of pixels in this tile; fewer than `side` at the lower and right edges
};

struct TilePlan {
  int side, channels;  // of a tile: pixels, channels
  int64_t height, width, all_channels;
  int64_t tile_rows, tile_columns, channel_tiles, units;
  int64_t group;  // units that advance together; the next ones follow when these are through
  int passes;
  bool from_end[kPasses];         // of each pass
  int direction[kPasses][kAxes];  // place in the caller's list, or -1
  Direction walks[kDirections];   // of the caller's list
  int64_t tasks;

  GATEDRNN_INLINE int64_t tiles() const { return tile_rows * tile_columns; }

  // Enough units to keep `blocks` busy twice over; more would only spread the maps in flight beyond
  // the L2 cache.
  void advance_together(int64_t blocks) {
    const int64_t wide = std::max<int64_t>(passes * tiles() / (tile_rows + tile_columns - 1), 1);
    group = std::clamp<int64_t>(ceil_div(2 * blocks, wide), 1, units);
  }

  // Tasks in an order in which each comes after those that it waits for: by groups of units, in a
  // group by antidiagonals, there both passes side by side.
  GATEDRNN_INLINE Task task(int64_t ticket) const {
    const int64_t whole = group * tiles() * passes, first = ticket / whole * group;
    const int64_t members = units - first < group ? units - first : group;
    const int64_t rest = ticket % whole;
    const int pass = static_cast<int>(rest / members % passes);
    Cell cell = diagonal_cell(rest / members / passes, tile_rows, tile_columns);
    if (from_end[pass]) cell = {tile_rows - 1 - cell.row, tile_columns - 1 - cell.column};
    Task t = task(first + rest % members, cell);
    t.pass = pass;
    t.from_end = from_end[pass];
    return t;
  }
  // A tile outside of any pass.
  GATEDRNN_INLINE Task task(int64_t unit, Cell cell) const {
    Task t{};
    t.unit = unit;
    t.cell = cell;
    t.n = t.unit / channel_tiles;
    t.c0 = t.unit % channel_tiles * channels;
    t.channels = part(all_channels, t.c0, channels);
    t.rows = part(height, t.cell.row * side, side);
    t.columns = part(width, t.cell.column * side, side);
    return t;
  }

  // The tile upstream along an axis, and whether there is one.
  GATEDRNN_INLINE Cell upstream(Cell cell, int axis, bool backwards) const {
    int64_t& at = axis == 0 ? cell.column : cell.row;
    at += backwards ? 1 : -1;
    return cell;
  }
  GATEDRNN_INLINE bool inside(Cell cell) const {
    return cell.row >= 0 && cell.row < tile_rows && cell.column >= 0 && cell.column < tile_columns;
  }
  GATEDRNN_INLINE int64_t index(Cell cell) const { return cell.row * tile_columns + cell.column; }

  // The states that leave a tile along an axis: [image][channel][tile along the line][line], lines
  // padded to whole tiles. This is the place of channel 0 and line 0 of the tile, for the image.
  GATEDRNN_INLINE int64_t border_size(int axis) const {  // for one image and channel
    return axis == 0 ? tile_columns * tile_rows * side : tile_rows * tile_columns * side;
  }
  GATEDRNN_INLINE int64_t border(int64_t n, int64_t c, Cell cell, int axis) const {
    const int64_t place =
        axis == 0 ? cell.column * tile_rows + cell.row : cell.row * tile_columns + cell.column;
    return (n * all_channels + c) * border_size(axis) + place * side;
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
  p.height = a.h, p.width = a.w, p.all_channels = a.c;
  p.tile_rows = ceil_div(a.h, side);
  p.tile_columns = ceil_div(a.w, side);
  p.channel_tiles = ceil_div(a.c, channels);
  p.units = a.n * p.channel_tiles;
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
  p.group = p.units;
  return p;
}

}  // namespace gatedrnn::cuda
