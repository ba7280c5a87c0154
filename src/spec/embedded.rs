//! The stage files that are built into the program: the defaults of a project without `stages/`.
//!
//! A file of the same name in a project's `stages/` stands in place of the one here. TOML only: weights are no defaults.

/// Reads `stages/NAME.toml` of this repository for each name.
macro_rules! stages {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../stages/", $name, ".toml")))),*]
    };
}

/// Stage files by name.
pub const STAGES: &[(&str, &str)] = stages![
    "assemble",
    "base_dit",
    "base_tokenizer",
    "base_vae",
    "base_vlm",
    "command",
    "generate",
    "handoff",
    "import",
    "mix",
    "mrgrpo",
    "prepare",
    "pretrain",
    "score",
    "sft",
];

/// Returns the text of a built-in stage file.
pub fn stage(name: &str) -> Option<&'static str> {
    STAGES.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// Returns the text of a file that a plan was made from, as it is now: on disk, or built in.
pub fn source_now(root: &std::path::Path, name: &str) -> Option<String> {
    match name.strip_prefix(super::project::BUILT_IN) {
        Some(file) => stage(file.rsplit('/').next()?.trim_end_matches(".toml")).map(str::to_owned),
        None => std::fs::read_to_string(root.join(name)).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_file_of_this_repository_is_built_in() {
        let mut files: Vec<String> = std::fs::read_dir("stages")
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|end| end == "toml"))
            .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        files.sort();
        assert_eq!(files, STAGES.iter().map(|(name, _)| *name).collect::<Vec<_>>(), "list it in embedded.rs");
    }
}
