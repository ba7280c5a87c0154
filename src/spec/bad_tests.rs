//! Every file in `tests/fixtures/bad` with what a person is told about it.
//!
//! A new file needs no line here: its snapshot is made by `INSTA_UPDATE=always cargo test bad_files`.

use std::path::PathBuf;

use super::{Overrides, Style, check, render};

/// The whole path: a snapshot's folder counts from the source file otherwise.
fn folder() -> PathBuf {
    std::path::absolute("tests/fixtures/bad").unwrap()
}

fn files(kind: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder().join(kind)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.file_stem().is_some_and(|name| name != "good"));
    files.sort();
    files
}

#[test]
fn bad_files_are_told_apart_with_file_line_and_what_to_do() {
    let mut num = 0;
    let mut silent = Vec::new();
    for kind in ["pipelines", "stages", "experiments"] {
        for file in files(kind) {
            let name = format!("{kind}-{}", file.file_stem().unwrap().to_string_lossy());
            let problems = check(&file, &Overrides::default());
            assert!(!problems.is_empty(), "{name} is not wrong");
            for problem in &problems {
                let says_what_to_do = problem.help.is_some() || problem.message.contains("must be");
                let says_where = problem.labels.first().is_some_and(|label| !label.spot.source.name.is_empty());
                if !says_what_to_do || !says_where {
                    silent.push(format!("{name}: {}", problem.message));
                }
            }
            // Where a message breaks depends on how long this folder's path is.
            let text = render(&problems, Style::Plain).replace("\n  | ", " ");
            let text = text.replace(&*folder().to_string_lossy(), "PROJECT");
            let mut settings = insta::Settings::clone_current();
            settings.set_snapshot_path(folder().join("snapshots"));
            settings.set_prepend_module_to_snapshot(false);
            settings.set_omit_expression(true);
            settings.bind(|| insta::assert_snapshot!(name, text));
            num += 1;
        }
    }
    assert_eq!(silent, Vec::<String>::new(), "no place, or nothing to do");
    assert!(num >= 60, "only {num} bad files");
}

#[test]
fn the_good_file_beside_them_is_good() {
    assert_eq!(check(&folder().join("pipelines/good.toml"), &Overrides::default()), []);
}
