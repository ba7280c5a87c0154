//! `deepgen init DIR`: a new project that runs at once on any machine.
//!
//! The files are templates of this program; nothing that lies in the folder is overwritten.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cli::{Exit, Wrong};

/// Arguments of `deepgen init`.
#[derive(Debug, clap::Args)]
pub struct InitArgs {
    /// Folder of the project; made when it is missing
    pub dir: PathBuf,
    /// Also write the pipelines that train the paper's model in the shapes world, and their ablations
    #[arg(long)]
    pub training: bool,
}

macro_rules! template {
    ($path:literal) => {
        ($path, include_str!(concat!("template/", $path)))
    };
}

/// Files of every project.
const FILES: [(&str, &str); 9] = [
    template!("README.md"),
    template!("artifacts/README.md"),
    template!("data/sentences.txt"),
    template!("experiments/top.toml"),
    template!("pipelines/main.toml"),
    template!("scripts/split.sh"),
    template!("stages/coverage.toml"),
    template!("stages/train.toml"),
    (".gitignore", include_str!("template/gitignore")),
];

/// Files with `--training`: those of this program's own project.
const TRAINING: [(&str, &str); 3] = [
    ("pipelines/base.toml", include_str!("../../pipelines/base.toml")),
    ("pipelines/full.toml", include_str!("../../pipelines/full.toml")),
    ("experiments/architecture.toml", include_str!("../../experiments/architecture.toml")),
];

/// Writes the project and says what to do next.
///
/// # Errors
/// When a file of it is there already, or the folder cannot be written.
pub fn init(args: &InitArgs) -> Result<Exit> {
    let files = || FILES.iter().chain(args.training.then_some(&TRAINING).into_iter().flatten());
    if let Some((path, _)) = files().find(|(path, _)| args.dir.join(path).symlink_metadata().is_ok()) {
        let there = args.dir.join(path);
        return Err(
            Wrong(format!("{} is there already; nothing was written: choose another folder", there.display())).into()
        );
    }
    for (path, text) in files() {
        write(&args.dir.join(path), text)?;
        println!("{path}");
    }
    println!("\ncd {}", args.dir.display());
    println!("deepgen run pipelines/main.toml");
    if args.training {
        println!(
            "deepgen run pipelines/base.toml     # base weights of the shapes world, then see pipelines/full.toml"
        );
    }
    Ok(Exit::Done)
}

fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
