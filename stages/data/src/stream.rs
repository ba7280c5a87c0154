//! The order of samples as arithmetic: which sample stands at a position of a stream, and which positions a batch takes
//! (docs/spec/data.md section 6, docs/spec/rl.md section 11).
//!
//! Everything is a function of (seed, rank, world, micro-iteration), so a resumed run asks for its next batch and
//! replays nothing. Departures from the release: streams of different tasks have seeds of their own, and the release's
//! prompt sampler, which repeats the same prompts each epoch, goes on here with new ones.

use deepgen_contract::data::{Sampling, TaskCycle};

use crate::keyed::{Permutation, StreamKey};
use crate::sample::SetKind;

/// Which of several equal programs this is, and the seed they share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Seed of the job.
    pub seed: u64,
    /// Place of this program, from 0.
    pub rank: u64,
    /// Number of programs.
    pub world: u64,
}

impl Shard {
    /// Returns the shard of a program that runs alone.
    pub fn single(seed: u64) -> Self {
        Self { seed, rank: 0, world: 1 }
    }

    /// Returns the position in the common stream of this program's element `i`.
    pub fn position(&self, i: u64) -> u64 {
        i * self.world + self.rank
    }
}

/// A sample of a mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ItemRef {
    /// Place of its set among the mixture's members.
    pub member: usize,
    /// Place in that set.
    pub index: u64,
}

/// One set of a stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StreamMember {
    /// Place among the mixture's members.
    pub member: usize,
    /// Samples that may be drawn.
    pub size: u64,
    /// Weight in sampling.
    pub weight: f64,
}

/// The endless stream of one kind of samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Stream {
    kind: SetKind,
    sampling: Sampling,
    members: Vec<StreamMember>,
    total: u64,
    /// Upper end of each member's share of `0.0..1.0`.
    cumulative: Vec<f64>,
}

impl Stream {
    /// Returns the stream over `members`; sizes and weights must be positive.
    pub fn new(kind: SetKind, sampling: Sampling, members: Vec<StreamMember>) -> Self {
        let mass: Vec<f64> = members.iter().map(|member| mass(sampling, member)).collect();
        let sum: f64 = mass.iter().sum();
        let mut upper = 0.0;
        let cumulative = mass.iter().map(|mass| {
            upper += mass / sum;
            upper
        });
        let cumulative = cumulative.collect();
        let total = members.iter().map(|member| member.size).sum();
        Self { kind, sampling, members, total, cumulative }
    }

    /// Returns each member's expected share of the stream.
    pub fn shares(&self) -> Vec<f64> {
        let mass: Vec<f64> = self.members.iter().map(|member| mass(self.sampling, member)).collect();
        let sum: f64 = mass.iter().sum();
        mass.iter().map(|mass| mass / sum).collect()
    }

    /// Returns the sets it draws from.
    pub fn members(&self) -> &[StreamMember] {
        &self.members
    }

    /// Returns the sample at `position` of the stream under `seed`.
    pub fn item(&self, seed: u64, position: u64) -> ItemRef {
        let key = StreamKey::derive(seed, self.kind.name());
        match self.sampling {
            Sampling::Permutation => {
                let pass = key.child(position / self.total);
                let mut index = Permutation::new(pass, self.total).at(position % self.total);
                for member in &self.members {
                    if index < member.size {
                        return ItemRef { member: member.member, index };
                    }
                    index -= member.size;
                }
                unreachable!("a permutation of the total stays below the sum of the sizes")
            }
            Sampling::SampleProportional | Sampling::WeightOnly => {
                let unit = key.unit(2 * position);
                // Rounding may leave the last upper end just under 1.
                let place = self.cumulative.partition_point(|&upper| upper <= unit).min(self.members.len() - 1);
                let member = &self.members[place];
                ItemRef { member: member.member, index: key.below(2 * position + 1, member.size) }
            }
        }
    }

    /// Returns `count` samples of this program, from its element `first` on.
    pub fn items(&self, shard: Shard, first: u64, count: u64) -> Vec<ItemRef> {
        (first..first + count).map(|i| self.item(shard.seed, shard.position(i))).collect()
    }
}

fn mass(sampling: Sampling, member: &StreamMember) -> f64 {
    match sampling {
        Sampling::Permutation => member.size as f64,
        Sampling::SampleProportional => member.size as f64 * member.weight,
        Sampling::WeightOnly => member.weight,
    }
}

/// Returns the kind of batch `micro_iteration`, and how many batches of that kind came before it.
pub fn cycle_place(cycle: TaskCycle, micro_iteration: u64) -> (SetKind, u64) {
    let length = cycle.edit + cycle.generation;
    let (turn, place) = (micro_iteration / length, micro_iteration % length);
    match place < cycle.edit {
        true => (SetKind::Edit, turn * cycle.edit + place),
        false => (SetKind::Generation, turn * cycle.generation + place - cycle.edit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(sampling: Sampling, sets: &[(u64, f64)]) -> Stream {
        let members = sets.iter().enumerate().map(|(member, &(size, weight))| StreamMember { member, size, weight });
        Stream::new(SetKind::Generation, sampling, members.collect())
    }

    #[test]
    fn each_pass_holds_every_sample_once() {
        let stream = stream(Sampling::Permutation, &[(5, 1.0), (7, 1.0), (1, 1.0)]);
        let mut passes = Vec::new();
        for pass in 0..3 {
            let items = stream.items(Shard::single(9), pass * 13, 13);
            let mut sorted = items.clone();
            sorted.sort();
            sorted.dedup();
            assert_eq!(sorted.len(), 13);
            passes.push(items);
        }
        assert!(passes[0] != passes[1] && passes[1] != passes[2]);
    }

    #[test]
    fn the_streams_of_all_ranks_interleave_to_the_single_stream() {
        for sampling in [Sampling::Permutation, Sampling::SampleProportional, Sampling::WeightOnly] {
            let stream = stream(sampling, &[(3, 1.0), (8, 2.0)]);
            let single = stream.items(Shard::single(4), 0, 60);
            for world in [2, 3, 4] {
                for rank in 0..world {
                    let own = stream.items(Shard { seed: 4, rank, world }, 0, 60 / world);
                    let expected: Vec<_> = single.iter().skip(rank as usize).step_by(world as usize).copied().collect();
                    assert_eq!(own, expected, "{sampling:?}, rank {rank} of {world}");
                }
            }
        }
    }

    #[test]
    fn resuming_by_arithmetic_equals_replay() {
        let shard = Shard { seed: 11, rank: 1, world: 3 };
        for sampling in [Sampling::Permutation, Sampling::SampleProportional] {
            let stream = stream(sampling, &[(10, 1.0), (13, 3.0)]);
            let replayed = stream.items(shard, 0, 200);
            for first in [0, 1, 7, 8, 100, 190] {
                assert_eq!(stream.items(shard, first, 10), replayed[first as usize..first as usize + 10]);
            }
        }
    }

    #[test]
    fn editing_comes_first_and_then_generation() {
        let kinds = |cycle, n| (0..n).map(|m| cycle_place(cycle, m)).collect::<Vec<_>>();
        use SetKind::{Edit, Generation};
        let stage1 = kinds(TaskCycle { edit: 1, generation: 3 }, 8);
        let expected =
            [(Edit, 0), (Generation, 0), (Generation, 1), (Generation, 2), (Edit, 1), (Generation, 3), (Generation, 4)];
        assert_eq!(stage1[..7], expected);
        assert_eq!(kinds(TaskCycle { edit: 1, generation: 2 }, 4)[3], (Edit, 1));
        assert_eq!(kinds(TaskCycle { edit: 0, generation: 1 }, 3)[2], (Generation, 2));
    }

    #[test]
    fn the_two_modes_of_sampling_have_the_shares_of_the_specification() {
        let sets = [(10, 3.0), (20, 1.0), (70, 1.0)];
        let close = |a: &[f64], b: [f64; 3], by: f64| a.iter().zip(b).all(|(a, b)| (a - b).abs() < by);
        for (sampling, expected) in [
            (Sampling::SampleProportional, [0.25, 1.0 / 6.0, 7.0 / 12.0]),
            (Sampling::WeightOnly, [0.6, 0.2, 0.2]),
            (Sampling::Permutation, [0.1, 0.2, 0.7]),
        ] {
            let stream = stream(sampling, &sets);
            assert!(close(&stream.shares(), expected, 1e-12), "{sampling:?}");
            let draws = stream.items(Shard::single(42), 0, 40_000);
            let mut counts = [0.0; 3];
            draws.iter().for_each(|item| counts[item.member] += 1.0 / 40_000.0);
            // Four standard deviations of a share of one half.
            assert!(close(&counts, expected, 0.01), "{sampling:?} {counts:?}");
            assert!(draws.iter().all(|item| item.index < sets[item.member].0));
        }
    }
}
