//! A layered layout of a directed acyclic graph: columns by depth, few crossings, straight edges where that is possible.
//!
//! Knows numbers only: which vertex feeds which. Edges that skip columns get a place in each of them, so that they run
//! between boxes instead of through them; edges of one source share these places.

use std::collections::BTreeMap;

/// Sweeps over the columns that look for fewer crossings.
const ORDER_SWEEPS: usize = 12;
/// Sweeps over the columns that straighten edges.
const PLACE_SWEEPS: usize = 10;

/// Half the height that is kept free for an edge.
const EDGE_HALF: f64 = 2.0;

/// A laid-out graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// Column of each vertex.
    pub columns: Vec<usize>,
    /// Centre of each vertex, downwards from 0.
    pub ys: Vec<f64>,
    /// For each edge its source and target, and column and height of each place between them.
    pub edges: Vec<Route>,
    /// Columns.
    pub num_columns: usize,
    /// Height of the whole.
    pub height: f64,
}

/// The way of an edge.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// Where it starts.
    pub source: usize,
    /// Where it ends.
    pub target: usize,
    /// Column and height of each place between them.
    pub through: Vec<(usize, f64)>,
}

/// The graph with a place for each edge in each column that it crosses.
struct Graph {
    /// Places of each column, in their order from above.
    columns: Vec<Vec<usize>>,
    /// Places in the next and the previous column that each place is joined to.
    next: Vec<Vec<usize>>,
    previous: Vec<Vec<usize>>,
    /// Places up to this number are vertices.
    num_vertices: usize,
    ys: Vec<f64>,
}

/// Lays out boxes of these heights, whose edges lead from lower to higher numbers; `gap` keeps neighbours of a column
/// apart.
pub fn layout(heights: &[f64], edges: &[(usize, usize)], gap: f64) -> Layout {
    let num_vertices = heights.len();
    let column_of = columns(num_vertices, edges);
    let num_columns = column_of.iter().max().map_or(0, |last| last + 1);
    let mut graph = Graph {
        columns: vec![Vec::new(); num_columns],
        next: vec![Vec::new(); num_vertices],
        previous: vec![Vec::new(); num_vertices],
        num_vertices,
        ys: vec![0.0; num_vertices],
    };
    for (vertex, column) in column_of.iter().enumerate() {
        graph.columns[*column].push(vertex);
    }
    let mut places: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    let mut chains = Vec::with_capacity(edges.len());
    for &(source, target) in edges {
        let mut chain = Vec::new();
        let mut last = source;
        for column in column_of[source] + 1..column_of[target] {
            let place = *places.entry((source, column)).or_insert_with(|| graph.add_place(column));
            graph.join(last, place);
            chain.push((column, place));
            last = place;
        }
        graph.join(last, target);
        chains.push(chain);
    }
    graph.order();
    graph.place(heights, gap);
    let tops = heights.iter().zip(&graph.ys).map(|(height, y)| y - height / 2.0);
    let top = tops.fold(f64::INFINITY, f64::min);
    let bottoms = heights.iter().zip(&graph.ys).map(|(height, y)| y + height / 2.0);
    let bottom = bottoms.fold(f64::NEG_INFINITY, f64::max);
    let route = |(&(source, target), chain): (&(usize, usize), &Vec<(usize, usize)>)| Route {
        source,
        target,
        through: chain.iter().map(|(column, place)| (*column, graph.ys[*place] - top)).collect(),
    };
    Layout {
        edges: edges.iter().zip(&chains).map(route).collect(),
        ys: graph.ys[..num_vertices].iter().map(|y| y - top).collect(),
        columns: column_of,
        num_columns,
        height: if num_vertices == 0 { 0.0 } else { bottom - top },
    }
}

/// Returns the column of each vertex: its depth, or further right when all that it feeds lies further right.
fn columns(num_vertices: usize, edges: &[(usize, usize)]) -> Vec<usize> {
    let (mut sources, mut readers) = (vec![Vec::new(); num_vertices], vec![Vec::new(); num_vertices]);
    for &(source, target) in edges {
        sources[target].push(source);
        readers[source].push(target);
    }
    let mut columns: Vec<usize> = vec![0; num_vertices];
    for vertex in 0..num_vertices {
        columns[vertex] = sources[vertex].iter().map(|source| columns[*source] + 1).max().unwrap_or(0);
    }
    for vertex in (0..num_vertices).rev() {
        if let Some(first) = readers[vertex].iter().map(|target| columns[*target]).min() {
            columns[vertex] = first - 1;
        }
    }
    columns
}

impl Graph {
    fn add_place(&mut self, column: usize) -> usize {
        let place = self.next.len();
        self.next.push(Vec::new());
        self.previous.push(Vec::new());
        self.ys.push(0.0);
        self.columns[column].push(place);
        place
    }

    fn join(&mut self, from: usize, to: usize) {
        if !self.next[from].contains(&to) {
            self.next[from].push(to);
            self.previous[to].push(from);
        }
    }

    /// Sorts the places of each column by the mean rank of their neighbours, and keeps the order with fewest crossings.
    fn order(&mut self) {
        let mut best = (self.num_crossings(), self.columns.clone());
        for sweep in 0..ORDER_SWEEPS {
            let num_columns = self.columns.len();
            let order: Vec<usize> =
                if sweep % 2 == 0 { (0..num_columns).collect() } else { (0..num_columns).rev().collect() };
            for column in order {
                let ranks = self.ranks();
                let joined = if sweep % 2 == 0 { &self.previous } else { &self.next };
                let mean = |place: &usize| {
                    let neighbours = &joined[*place];
                    match neighbours.len() {
                        // Without neighbours it stays where it is.
                        0 => ranks[*place],
                        num => neighbours.iter().map(|other| ranks[*other]).sum::<f64>() / num as f64,
                    }
                };
                self.columns[column].sort_by(|a, b| mean(a).total_cmp(&mean(b)));
            }
            let num_crossings = self.num_crossings();
            if num_crossings < best.0 {
                best = (num_crossings, self.columns.clone());
            }
        }
        self.columns = best.1;
    }

    /// Returns the rank of each place within its column, 0 to 1.
    fn ranks(&self) -> Vec<f64> {
        let mut ranks = vec![0.0; self.next.len()];
        for column in &self.columns {
            for (index, place) in column.iter().enumerate() {
                ranks[*place] = (index as f64 + 0.5) / column.len() as f64;
            }
        }
        ranks
    }

    fn num_crossings(&self) -> usize {
        let mut index = vec![0; self.next.len()];
        for column in &self.columns {
            column.iter().enumerate().for_each(|(at, place)| index[*place] = at);
        }
        let crossings = |column: &Vec<usize>| {
            let joints: Vec<(usize, usize)> =
                column.iter().flat_map(|from| self.next[*from].iter().map(|to| (index[*from], index[*to]))).collect();
            let crosses = |(i, a): (usize, &(usize, usize))| {
                joints[i + 1..].iter().filter(|b| (a.0 < b.0 && a.1 > b.1) || (a.0 > b.0 && a.1 < b.1)).count()
            };
            joints.iter().enumerate().map(crosses).sum::<usize>()
        };
        self.columns.iter().map(crossings).sum()
    }

    /// Gives each place a height near the mean of its neighbours', with the order and the distances kept.
    fn place(&mut self, heights: &[f64], gap: f64) {
        for column in &self.columns {
            let offsets = self.offsets(column, heights, gap);
            let middle = offsets.last().copied().unwrap_or(0.0) / 2.0;
            column.iter().zip(offsets).for_each(|(place, offset)| self.ys[*place] = offset - middle);
        }
        for sweep in 0..PLACE_SWEEPS {
            let num_columns = self.columns.len();
            for step in 0..num_columns {
                let column = if sweep % 2 == 0 { step } else { num_columns - 1 - step };
                let places = &self.columns[column];
                let wanted: Vec<f64> = places
                    .iter()
                    .map(|place| {
                        let neighbours = self.previous[*place].iter().chain(&self.next[*place]);
                        let (sum, num) = neighbours.fold((0.0, 0.0), |(sum, num), other| {
                            // Long edges are straightened before boxes are centred.
                            let is_long = *place >= self.num_vertices || *other >= self.num_vertices;
                            let weight = if is_long { 4.0 } else { 1.0 };
                            (sum + weight * self.ys[*other], num + weight)
                        });
                        if num == 0.0 { self.ys[*place] } else { sum / num }
                    })
                    .collect();
                let offsets = self.offsets(places, heights, gap);
                let settled = settle(&wanted, &offsets);
                for (place, y) in self.columns[column].iter().zip(settled) {
                    self.ys[*place] = y;
                }
            }
        }
    }

    /// Returns the smallest heights of a column's places, from 0 for the first.
    fn offsets(&self, column: &[usize], heights: &[f64], gap: f64) -> Vec<f64> {
        let half = |place: usize| heights.get(place).map_or(EDGE_HALF, |height| height / 2.0);
        let mut offsets = Vec::with_capacity(column.len());
        let mut at = 0.0;
        for (index, place) in column.iter().enumerate() {
            if index > 0 {
                at += half(column[index - 1]) + gap + half(*place);
            }
            offsets.push(at);
        }
        offsets
    }
}

/// Returns the heights nearest to those wanted, in the sense of least squares, whose distances are at least those of
/// `offsets`: neighbours that are too near are moved as one block.
fn settle(wanted: &[f64], offsets: &[f64]) -> Vec<f64> {
    let mut blocks: Vec<(f64, usize)> = Vec::new();
    for (wanted, offset) in wanted.iter().zip(offsets) {
        blocks.push((wanted - offset, 1));
        while let [.., (above, num_above), (below, num_below)] = blocks[..]
            && above > below
        {
            let num = num_above + num_below;
            let mean = (above * num_above as f64 + below * num_below as f64) / num as f64;
            blocks.truncate(blocks.len() - 2);
            blocks.push((mean, num));
        }
    }
    let levels = blocks.into_iter().flat_map(|(level, num)| std::iter::repeat_n(level, num));
    levels.zip(offsets).map(|(level, offset)| level + offset).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_stand_next_to_what_they_feed_and_a_chain_is_straight() {
        // A chain 0, 2, 3, 4; a source of its end; and an edge along the whole of it.
        let edges = [(0, 2), (2, 3), (3, 4), (1, 4), (0, 4)];
        let layout = layout(&[40.0; 5], &edges, 10.0);
        assert_eq!(layout.columns, [0, 2, 1, 2, 3]);
        assert_eq!(layout.num_columns, 4);
        let long = &layout.edges[4];
        assert_eq!(long.through.iter().map(|place| place.0).collect::<Vec<_>>(), [1, 2]);
        assert!(layout.ys.iter().all(|y| *y >= 20.0 && *y <= layout.height - 20.0));
    }

    #[test]
    fn boxes_of_a_column_keep_their_distance() {
        let edges: Vec<(usize, usize)> = (0..12).map(|source| (source, 12)).collect();
        let layout = layout(&[40.0; 13], &edges, 10.0);
        let mut ys = layout.ys[..12].to_vec();
        ys.sort_by(f64::total_cmp);
        assert!(ys.windows(2).all(|pair| pair[1] - pair[0] >= 49.9), "{ys:?}");
        assert!((layout.ys[12] - layout.height / 2.0).abs() < 1.0);
    }

    #[test]
    fn crossings_that_can_be_avoided_are() {
        let edges = [(0, 5), (1, 4), (2, 3)];
        let layout = layout(&[40.0; 6], &edges, 10.0);
        let is_below = |a: usize, b: usize| layout.ys[a] > layout.ys[b];
        assert_eq!(is_below(0, 1), is_below(5, 4));
        assert_eq!(is_below(1, 2), is_below(4, 3));
    }

    #[test]
    fn an_empty_graph_has_no_size() {
        assert_eq!(layout(&[], &[], 10.0).height, 0.0);
    }
}
