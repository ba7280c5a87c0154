//! The kinds of stages: their ports, what they make, the version of their code, what they need of a machine.
//!
//! A closed set: the worker has one file per kind, the orchestrator wires nodes by the ports listed here.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::artifact::ArtifactKind;

/// What a stage does; written as `kind = "..."` at the top of a stage file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageKind {
    /// External weights, verified by hash.
    Import,
    /// A data source: read, validated, indexed.
    Prepare,
    /// A mixture of prepared sources.
    Mix,
    /// Flow-matching training: stages 1 and 2.
    Train,
    /// MR-GRPO: stage 3.
    Rl,
    /// Checkpoint hand-off: the next stage's weights from a checkpoint and the weights it started from.
    Handoff,
    /// Prompts to images.
    Generate,
    /// Images to scores.
    Score,
    /// Trains the tokenizer of the shapes world's base.
    BaseTokenizer,
    /// Trains the autoencoder of the shapes world's base.
    BaseVae,
    /// Trains the vision-language model of the shapes world's base.
    BaseVlm,
    /// Trains the diffusion transformer of the shapes world's base under its own text encoder.
    BaseDit,
    /// Puts the parts of a base together.
    Assemble,
    /// An external program, started by the orchestrator itself.
    Command,
}

/// An input of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// Key in a node's `inputs`.
    pub name: &'static str,
    /// What must be wired to it.
    pub accepts: ArtifactKind,
    /// False when the stage can do without.
    pub required: bool,
}

/// Inputs of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    /// These and no others.
    Named(&'static [Port]),
    /// One or more, under names that the pipeline chooses and the settings refer to.
    Members(ArtifactKind),
    /// Any number of any kind, under names that the pipeline chooses and the command refers to.
    Free,
}

const fn required(name: &'static str, accepts: ArtifactKind) -> Port {
    Port { name, accepts, required: true }
}

const fn optional(name: &'static str, accepts: ArtifactKind) -> Port {
    Port { name, accepts, required: false }
}

impl StageKind {
    /// Every kind.
    pub const ALL: [Self; 14] = [
        Self::Import,
        Self::Prepare,
        Self::Mix,
        Self::Train,
        Self::Rl,
        Self::Handoff,
        Self::Generate,
        Self::Score,
        Self::BaseTokenizer,
        Self::BaseVae,
        Self::BaseVlm,
        Self::BaseDit,
        Self::Assemble,
        Self::Command,
    ];

    /// Returns the name written in stage files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Import => "import",
            Self::Prepare => "prepare",
            Self::Mix => "mix",
            Self::Train => "train",
            Self::Rl => "rl",
            Self::Handoff => "handoff",
            Self::Generate => "generate",
            Self::Score => "score",
            Self::BaseTokenizer => "base_tokenizer",
            Self::BaseVae => "base_vae",
            Self::BaseVlm => "base_vlm",
            Self::BaseDit => "base_dit",
            Self::Assemble => "assemble",
            Self::Command => "command",
        }
    }

    /// Returns the kind of a name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Returns the inputs.
    pub fn ports(self) -> Ports {
        use ArtifactKind::{Checkpoint, Dataset, Images, Mixture, Weights};
        match self {
            Self::Import | Self::Prepare => Ports::Named(&[]),
            Self::Mix => Ports::Members(Dataset),
            Self::Train => Ports::Named(const { &[required("weights", Weights), required("data", Mixture)] }),
            Self::Rl => Ports::Named(
                const { &[required("weights", Weights), required("prompts", Mixture), optional("data", Mixture)] },
            ),
            Self::Handoff => {
                Ports::Named(const { &[required("weights", Weights), required("checkpoint", Checkpoint)] })
            }
            Self::Generate => Ports::Named(const { &[required("weights", Weights)] }),
            Self::Score => Ports::Named(const { &[required("images", Images)] }),
            Self::BaseTokenizer | Self::BaseVae => Ports::Named(const { &[required("data", Mixture)] }),
            Self::BaseVlm => Ports::Named(
                const { &[required("tokenizer", Weights), required("data", Mixture), required("questions", Dataset)] },
            ),
            Self::BaseDit => Ports::Named(
                const { &[required("tokenizer", Weights), required("vae", Weights), required("data", Mixture)] },
            ),
            Self::Assemble => Ports::Members(Weights),
            Self::Command => Ports::Free,
        }
    }

    /// Returns what the stage makes; a command's settings may say something else.
    pub fn output(self) -> ArtifactKind {
        match self {
            Self::Import | Self::Handoff | Self::Assemble => ArtifactKind::Weights,
            Self::BaseTokenizer | Self::BaseVae | Self::BaseVlm | Self::BaseDit => ArtifactKind::Weights,
            Self::Prepare => ArtifactKind::Dataset,
            Self::Mix => ArtifactKind::Mixture,
            Self::Train | Self::Rl => ArtifactKind::Checkpoint,
            Self::Generate => ArtifactKind::Images,
            Self::Score => ArtifactKind::Scores,
            Self::Command => ArtifactKind::Data,
        }
    }

    /// Returns the version of the stage's code: part of every fingerprint, raised when results change.
    pub fn code_version(self) -> u32 {
        match self {
            // 2: the shapes world's `clip_sim` became continuous.
            Self::Rl => 2,
            // 2: the gradients of its convolutions' weights are summed in another order.
            Self::BaseVae => 2,
            _ => 1,
        }
    }

    /// Returns true when the stage computes on the run's device; the others use a core and no accelerator.
    pub fn uses_device(self) -> bool {
        match self {
            Self::Train | Self::Rl | Self::Generate | Self::BaseVae | Self::BaseVlm | Self::BaseDit => true,
            Self::Import | Self::Prepare | Self::Mix | Self::Handoff | Self::Score => false,
            Self::BaseTokenizer | Self::Assemble => false,
            // Unless its settings name the device: see `Settings::uses_device`.
            Self::Command => false,
        }
    }
}

impl fmt::Display for StageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_agree_with_serde_and_parse_back() {
        for kind in StageKind::ALL {
            assert_eq!(StageKind::parse(kind.name()), Some(kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
        assert_eq!(StageKind::parse("trian"), None);
    }
}
