//! An opened mixture: its batches by number, and the samples they name.
//!
//! Knows which samples make a batch; `stream` knows their order, `batch` makes tensors' worth of numbers of them.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::dataset::{DatasetError, PreparedDataset};
use crate::mix::{MIXTURE_FILE, MIXTURE_VERSION, MixtureFile, aligned};
use crate::sample::{PromptSample, Sample, SetKind, Task};
use crate::source::{DataSource, ReadError};
use crate::stream::{ItemRef, Shard, Stream, StreamMember, cycle_place};

/// Why a mixture cannot be opened.
#[derive(Debug, Error)]
pub enum MixtureError {
    /// The description is missing or unreadable.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The description is damaged.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Written by another version.
    #[error("{}: version {found} is not read here ({MIXTURE_VERSION} is); mix again", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A member cannot be opened.
    #[error("member `{name}`: {source}")]
    Dataset {
        /// The member.
        name: String,
        /// Why.
        source: DatasetError,
    },
    /// A member is not what it was.
    #[error("member `{name}` has changed since the mixture was made: {reason}; mix again")]
    Changed {
        /// The member.
        name: String,
        /// What differs.
        reason: String,
    },
    /// More samples held out than there are.
    #[error("cannot hold out {wanted} of the {available} samples of `{name}`: none would be left")]
    TooFew {
        /// The member.
        name: String,
        /// Samples to hold out.
        wanted: u64,
        /// Samples there are.
        available: u64,
    },
    /// The mixture holds no samples of a kind.
    #[error("the mixture holds no {} samples", kind.name())]
    NoSuchKind {
        /// The kind.
        kind: SetKind,
    },
}

/// The samples of one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Task of all of them.
    pub task: Task,
    /// The samples, in order.
    pub items: Vec<ItemRef>,
}

/// A mixture with its data sets.
#[derive(Debug)]
pub struct Mixture {
    file: MixtureFile,
    datasets: Vec<PreparedDataset>,
    /// Samples at the end of each set that no stream draws.
    held_out: Vec<u64>,
    streams: Vec<(SetKind, Stream)>,
}

impl Mixture {
    /// Opens the mixture in `dir` and its data sets.
    ///
    /// # Errors
    /// When a file is missing, damaged, from another version, or a data set has changed.
    pub fn open(dir: &Path) -> Result<Self, MixtureError> {
        let path = dir.join(MIXTURE_FILE);
        let bytes = std::fs::read(&path).map_err(|source| MixtureError::Io { path: path.clone(), source })?;
        let file: MixtureFile =
            serde_json::from_slice(&bytes).map_err(|source| MixtureError::Json { path: path.clone(), source })?;
        if file.version != MIXTURE_VERSION {
            return Err(MixtureError::Version { path, found: file.version });
        }
        let mut datasets = Vec::new();
        for member in &file.members {
            let name = &member.name;
            let sibling = dir.parent().zip(member.path.file_name()).map(|(parent, name)| parent.join(name));
            let moved = sibling.filter(|sibling| !member.path.exists() && sibling.exists());
            let dataset = PreparedDataset::open(moved.as_deref().unwrap_or(&member.path))
                .map_err(|source| MixtureError::Dataset { name: name.clone(), source })?;
            let (kind, size) = (dataset.kind(), dataset.len());
            if (kind, size) != (member.kind, member.num_samples) {
                let (old_kind, old_size) = (member.kind.name(), member.num_samples);
                let reason = format!("{size} {} samples instead of {old_size} {old_kind}", kind.name());
                return Err(MixtureError::Changed { name: name.clone(), reason });
            }
            datasets.push(dataset);
        }
        let held_out = vec![0; datasets.len()];
        let mut mixture = Self { file, datasets, held_out, streams: Vec::new() };
        mixture.rebuild_streams();
        Ok(mixture)
    }

    /// Takes `count` samples of each task out of the streams, split evenly over the task's sets, from their ends.
    ///
    /// # Errors
    /// When that leaves nothing of a set.
    pub fn hold_out_per_task(self, count: u64) -> Result<Self, MixtureError> {
        let mut held_out = self.held_out.clone();
        for (_, stream) in &self.streams {
            let num_members = stream.members().len() as u64;
            for (i, member) in stream.members().iter().enumerate() {
                held_out[member.member] = count / num_members + u64::from((i as u64) < count % num_members);
            }
        }
        self.with_held_out(held_out)
    }

    /// Takes the last `count` samples of each set out of the streams.
    ///
    /// # Errors
    /// When that leaves nothing of a set.
    pub fn hold_out_per_member(self, count: u64) -> Result<Self, MixtureError> {
        let held_out = vec![count; self.datasets.len()];
        self.with_held_out(held_out)
    }

    fn with_held_out(mut self, held_out: Vec<u64>) -> Result<Self, MixtureError> {
        for (member, &wanted) in self.file.members.iter().zip(&held_out) {
            let available = member.num_samples;
            if wanted >= available {
                return Err(MixtureError::TooFew { name: member.name.clone(), wanted, available });
            }
        }
        self.held_out = held_out;
        self.rebuild_streams();
        Ok(self)
    }

    fn rebuild_streams(&mut self) {
        let streams = [SetKind::Edit, SetKind::Generation, SetKind::Prompts].into_iter().filter_map(|kind| {
            let members = self.file.members.iter().enumerate().filter(|(_, member)| member.kind == kind);
            let members: Vec<_> = members
                .map(|(i, member)| StreamMember {
                    member: i,
                    size: member.num_samples - self.held_out[i],
                    weight: member.weight,
                })
                .collect();
            (!members.is_empty()).then(|| (kind, Stream::new(kind, self.file.sampling, members)))
        });
        self.streams = streams.collect();
    }

    /// Returns what `mixture.json` says.
    pub fn description(&self) -> &MixtureFile {
        &self.file
    }

    /// Returns the data set of member `i`.
    pub fn dataset(&self, member: usize) -> &PreparedDataset {
        &self.datasets[member]
    }

    /// Returns the number of samples of a member that are not held out.
    pub fn trainable_size(&self, member: usize) -> u64 {
        self.file.members[member].num_samples - self.held_out[member]
    }

    /// Returns true when there are samples of `kind`.
    pub fn holds(&self, kind: SetKind) -> bool {
        self.streams.iter().any(|(other, _)| *other == kind)
    }

    /// Returns the samples of `kind` that are held out, set by set in order.
    pub fn held_out(&self, kind: SetKind) -> Vec<ItemRef> {
        let members = self.file.members.iter().enumerate().filter(|(_, member)| member.kind == kind);
        let items = members.flat_map(|(i, member)| {
            let first = member.num_samples - self.held_out[i];
            (first..member.num_samples).map(move |index| ItemRef { member: i, index })
        });
        items.collect()
    }

    /// Returns the samples of batch `micro_iteration` of this program.
    ///
    /// # Errors
    /// When the mixture holds prompts.
    pub fn slot(&self, shard: Shard, micro_iteration: u64) -> Result<Slot, MixtureError> {
        let (kind, batch) = match self.holds(SetKind::Prompts) {
            true => (SetKind::Prompts, micro_iteration),
            false => cycle_place(self.file.cycle, micro_iteration),
        };
        let task = kind.task().ok_or(MixtureError::NoSuchKind { kind: SetKind::Generation })?;
        let size = self.file.micro_batch as u64;
        Ok(Slot { task, items: self.items(kind, shard, batch * size, size)? })
    }

    /// Returns how many samples of each member the first `iterations` batches of `world` programs hold: the realised
    /// mixture, by arithmetic. Nothing for prompts, which are not drawn in batches.
    pub fn num_drawn(&self, seed: u64, world: u64, iterations: u64) -> Vec<u64> {
        let mut counts = vec![0; self.file.members.len()];
        for rank in 0..world {
            for iteration in 0..iterations {
                let Ok(slot) = self.slot(Shard { seed, rank, world }, iteration) else { return counts };
                slot.items.iter().for_each(|item| counts[item.member] += 1);
            }
        }
        counts
    }

    /// Returns what was drawn beside what was expected, as a table for a person.
    pub fn realised_table(&self, num_drawn: &[u64]) -> String {
        let total = num_drawn.iter().sum::<u64>().max(1) as f64;
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let mut rows = vec![["set", "kind", "drawn", "share", "realised"].map(str::to_owned)];
        for (member, &count) in self.file.members.iter().zip(num_drawn) {
            let kind = member.kind.name().to_owned();
            let (share, realised) = (percent(member.share), percent(count as f64 / total));
            rows.push([member.name.clone(), kind, count.to_string(), share, realised]);
        }
        aligned(&rows, 2)
    }

    /// Returns `count` samples of `kind` of this program, from its element `first` on.
    ///
    /// # Errors
    /// When the mixture holds none of that kind.
    pub fn items(&self, kind: SetKind, shard: Shard, first: u64, count: u64) -> Result<Vec<ItemRef>, MixtureError> {
        let stream = self.streams.iter().find(|(other, _)| *other == kind);
        let (_, stream) = stream.ok_or(MixtureError::NoSuchKind { kind })?;
        Ok(stream.items(shard, first, count))
    }

    /// Reads a sample with its images.
    ///
    /// # Errors
    /// Names the file and record that cannot be read.
    pub fn sample(&self, item: ItemRef) -> Result<Sample, ReadError> {
        self.datasets[item.member].get(item.index)
    }

    /// Reads a prompt; its rewards are those of member [`PromptSample::member`].
    ///
    /// # Errors
    /// Names the file and record that cannot be read.
    pub fn prompt(&self, item: ItemRef) -> Result<PromptSample, ReadError> {
        let record = self.datasets[item.member].record(item.index)?;
        Ok(PromptSample { text: record.text, key: record.key, member: item.member })
    }
}
