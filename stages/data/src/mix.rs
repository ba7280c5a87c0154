//! Writes a mixture: `mixture.json` names prepared data sets and says how they become one stream.
//!
//! All that can be wrong with a mixture is found here, before anything trains on it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use deepgen_contract::data::{ContaminationPolicy, MemberSettings, MixSettings, Sampling, TaskCycle};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::atomic;
use crate::contamination::{BenchmarkPrompts, Detector, Overlap};
use crate::dataset::{DatasetError, PreparedDataset};
use crate::sample::SetKind;
use crate::source::ReadError;
use crate::stream::{Stream, StreamMember};

/// Version of [`MixtureFile`].
pub const MIXTURE_VERSION: u32 = 1;
/// Description of a mixture: its only file.
pub const MIXTURE_FILE: &str = "mixture.json";

/// `mixture.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureFile {
    /// [`MIXTURE_VERSION`] of the writer.
    pub version: u32,
    /// Order of batches; without meaning for prompts.
    pub cycle: TaskCycle,
    /// Samples of a batch.
    pub micro_batch: usize,
    /// How a stream chooses its next sample.
    pub sampling: Sampling,
    /// The data sets, by name.
    pub members: Vec<MixtureMember>,
    /// Overlaps with benchmarks, where there are any.
    pub overlaps: Vec<Overlap>,
}

/// One data set of a mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureMember {
    /// Name of the input.
    pub name: String,
    /// Its folder, absolute; a sibling of the mixture's folder of the same name serves when it has moved.
    pub path: PathBuf,
    /// What it holds.
    pub kind: SetKind,
    /// Its samples.
    pub num_samples: u64,
    /// Its samples in the paper; 0 when unknown.
    pub nominal_size: u64,
    /// Weight in sampling.
    pub weight: f64,
    /// Weights of rewards, for prompts.
    pub rewards: BTreeMap<String, f64>,
    /// Expected share of all samples drawn.
    pub share: f64,
    /// The same with the sizes of the paper; nothing when one of them is unknown.
    pub nominal_share: Option<f64>,
}

/// Why there is no mixture.
#[derive(Debug, Error)]
pub enum MixError {
    /// There are no inputs.
    #[error("a mixture needs at least one prepared data set")]
    Empty,
    /// Settings for an input that is not wired.
    #[error("`members.{name}` names no input; the inputs are {}", known.join(", "))]
    UnknownMember {
        /// The name.
        name: String,
        /// Inputs there are.
        known: Vec<String>,
    },
    /// A setting of a member makes no sense.
    #[error("`members.{name}`: {reason}")]
    Member {
        /// The member.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A setting of the mixture makes no sense for its inputs.
    #[error("{0}")]
    Settings(String),
    /// A data set cannot be opened.
    #[error("input `{name}`: {source}")]
    Dataset {
        /// The member.
        name: String,
        /// Why.
        source: DatasetError,
    },
    /// A text cannot be read.
    #[error("input `{name}`: {source}")]
    Read {
        /// The member.
        name: String,
        /// Why.
        source: Box<ReadError>,
    },
    /// Texts overlap with a benchmark, and the policy is to fail.
    #[error(
        "`{}` overlaps with the benchmark `{}`: {} texts equal and {} share words with {} of its {} prompts; \
         leave the set out or set `contamination.policy` to \"warn\"",
        overlap.member, overlap.benchmark, overlap.num_equal, overlap.num_sharing, overlap.num_prompts_hit,
        overlap.num_prompts
    )]
    Contaminated {
        /// The first overlap.
        overlap: Box<Overlap>,
    },
    /// The result cannot be written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The result has no JSON form.
    #[error("the mixture cannot be written: {0}")]
    Json(#[from] serde_json::Error),
}

/// Checks and writes the mixture of `inputs`, names and folders of prepared data sets, into `out_dir`.
///
/// # Errors
/// Names the first input or setting that is wrong, or the overlap that the policy does not allow.
pub fn mix(
    settings: &MixSettings,
    inputs: &[(String, PathBuf)],
    benchmarks: &[BenchmarkPrompts],
    out_dir: &Path,
) -> Result<MixtureFile, MixError> {
    let mut inputs = inputs.to_vec();
    inputs.sort();
    if let Some(name) = settings.members.keys().find(|name| inputs.iter().all(|(input, _)| input != *name)) {
        let known = inputs.iter().map(|(name, _)| name.clone()).collect();
        return Err(MixError::UnknownMember { name: name.clone(), known });
    }
    let mut members = Vec::new();
    let mut overlaps = Vec::new();
    let detectors: Vec<Detector<'_>> = match settings.contamination.policy {
        ContaminationPolicy::Off => Vec::new(),
        _ => benchmarks.iter().map(|benchmark| Detector::new(benchmark, settings.contamination.ngram)).collect(),
    };
    for (name, path) in &inputs {
        let open = |source| MixError::Dataset { name: name.clone(), source };
        let dataset = PreparedDataset::open(path).map_err(open)?;
        let given = settings.members.get(name).cloned().unwrap_or_default();
        check_member(name, &given, dataset.kind(), settings.sampling)?;
        overlaps.extend(overlaps_of(name, &dataset, settings.contamination.policy, &detectors)?);
        let path = std::path::absolute(path).map_err(|source| MixError::Io { path: path.clone(), source })?;
        members.push(MixtureMember {
            name: name.clone(),
            path,
            kind: dataset.kind(),
            num_samples: dataset.description().num_samples,
            nominal_size: dataset.description().nominal_size,
            weight: given.weight,
            rewards: given.rewards,
            share: 0.0,
            nominal_share: None,
        });
    }
    check_kinds(settings, &members)?;
    set_shares(settings, &mut members);
    let (cycle, micro_batch, sampling) = (settings.cycle, settings.micro_batch, settings.sampling);
    let file = MixtureFile { version: MIXTURE_VERSION, cycle, micro_batch, sampling, members, overlaps };
    std::fs::create_dir_all(out_dir).map_err(|source| MixError::Io { path: out_dir.to_owned(), source })?;
    let path = out_dir.join(MIXTURE_FILE);
    atomic::write(&path, &serde_json::to_vec_pretty(&file)?).map_err(|source| MixError::Io { path, source })?;
    Ok(file)
}

fn check_member(name: &str, given: &MemberSettings, kind: SetKind, sampling: Sampling) -> Result<(), MixError> {
    let wrong = |reason: &str| Err(MixError::Member { name: name.to_owned(), reason: reason.to_owned() });
    if kind == SetKind::Questions {
        return wrong("questions are no part of a mixture; wire the set to the stage itself");
    }
    if !(given.weight > 0.0 && given.weight.is_finite()) {
        return wrong("`weight` must be a positive number");
    }
    if sampling == Sampling::Permutation && given.weight != 1.0 {
        return wrong("`weight` has no effect with `sampling = \"permutation\"`; choose another sampling");
    }
    if kind != SetKind::Prompts && !given.rewards.is_empty() {
        return wrong("`rewards` belong to prompts, and this set has images");
    }
    if given.rewards.values().any(|weight| !(*weight > 0.0 && weight.is_finite())) {
        return wrong("weights of `rewards` must be positive numbers");
    }
    Ok(())
}

fn check_kinds(settings: &MixSettings, members: &[MixtureMember]) -> Result<(), MixError> {
    let wrong = |reason: String| Err(MixError::Settings(reason));
    let name_of = |kind| members.iter().find(|member| member.kind == kind).map(|member| &member.name);
    if members.is_empty() {
        return Err(MixError::Empty);
    }
    if settings.micro_batch == 0 {
        return wrong("`micro_batch` must be at least 1".into());
    }
    if let Some(prompts) = name_of(SetKind::Prompts) {
        return match members.iter().find(|member| member.kind != SetKind::Prompts) {
            None => Ok(()),
            Some(other) => wrong(format!("`{prompts}` holds prompts and `{}` images; mix them apart", other.name)),
        };
    }
    for (kind, batches) in [(SetKind::Edit, settings.cycle.edit), (SetKind::Generation, settings.cycle.generation)] {
        match (name_of(kind), batches) {
            (None, 1..) => {
                let key = kind.name();
                return wrong(format!("`cycle.{key}` is {batches}, but no input holds {key} samples"));
            }
            (Some(name), 0) => {
                return wrong(format!("`cycle.{}` is 0, so `{name}` would never be drawn", kind.name()));
            }
            _ => {}
        }
    }
    Ok(())
}

fn set_shares(settings: &MixSettings, members: &mut [MixtureMember]) {
    let cycle = settings.cycle;
    for kind in [SetKind::Edit, SetKind::Generation, SetKind::Prompts] {
        let part = match kind {
            SetKind::Edit => cycle.edit as f64 / (cycle.edit + cycle.generation) as f64,
            SetKind::Generation => cycle.generation as f64 / (cycle.edit + cycle.generation) as f64,
            SetKind::Prompts | SetKind::Questions => 1.0,
        };
        let places: Vec<usize> = (0..members.len()).filter(|&i| members[i].kind == kind).collect();
        let shares = |size: &dyn Fn(&MixtureMember) -> u64| {
            let streams = places.iter().map(|&member| StreamMember {
                member,
                size: size(&members[member]),
                weight: members[member].weight,
            });
            Stream::new(kind, settings.sampling, streams.collect()).shares()
        };
        let own = shares(&|member| member.num_samples);
        let is_known = places.iter().all(|&i| members[i].nominal_size > 0);
        let nominal = is_known.then(|| shares(&|member| member.nominal_size));
        for (i, &place) in places.iter().enumerate() {
            members[place].share = part * own[i];
            members[place].nominal_share = nominal.as_ref().map(|shares| part * shares[i]);
        }
    }
}

fn overlaps_of(
    name: &str,
    dataset: &PreparedDataset,
    policy: ContaminationPolicy,
    detectors: &[Detector<'_>],
) -> Result<Vec<Overlap>, MixError> {
    if detectors.is_empty() {
        return Ok(Vec::new());
    }
    let mut comparisons: Vec<_> = detectors.iter().map(|detector| detector.begin(name)).collect();
    for text in dataset.texts() {
        let text = text.map_err(|source| MixError::Read { name: name.to_owned(), source: Box::new(source) })?;
        comparisons.iter_mut().for_each(|comparison| comparison.add(&text));
    }
    let overlaps: Vec<_> = comparisons.into_iter().map(|c| c.finish()).filter(|overlap| !overlap.is_clean()).collect();
    match overlaps.first() {
        Some(overlap) if policy == ContaminationPolicy::Fail => {
            Err(MixError::Contaminated { overlap: Box::new(overlap.clone()) })
        }
        _ => Ok(overlaps),
    }
}

impl MixtureFile {
    /// Returns the members as a table for a person.
    pub fn table(&self) -> String {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let mut rows = vec![["set", "kind", "samples", "weight", "share", "paper"].map(str::to_owned)];
        for member in &self.members {
            rows.push([
                member.name.clone(),
                member.kind.name().to_owned(),
                member.num_samples.to_string(),
                member.weight.to_string(),
                percent(member.share),
                member.nominal_share.map_or_else(|| "-".to_owned(), percent),
            ]);
        }
        aligned(&rows, 2)
    }
}

/// Lays rows out in columns; the first `num_left` are aligned to the left.
pub(crate) fn aligned<const N: usize>(rows: &[[String; N]], num_left: usize) -> String {
    let widths: [usize; N] = std::array::from_fn(|c| rows.iter().map(|row| row[c].len()).max().unwrap_or(0));
    let mut table = String::new();
    for row in rows {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            let _ = match column < num_left {
                true => write!(table, "{gap}{cell:<width$}"),
                false => write!(table, "{gap}{cell:>width$}"),
            };
        }
        table.push('\n');
    }
    table
}
