//! docs/guide.md is run: every command of it in order, in a project that `deepgen init` writes, with every edit it asks for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A fenced block: what stands behind the fence, and its lines.
struct Block {
    info: Vec<String>,
    text: String,
}

fn blocks(text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for line in text.lines() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(info), None) => {
                let info = info.split_whitespace().map(str::to_owned).collect();
                open = Some(Block { info, text: String::new() });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some(block)) => {
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, None) => {}
        }
    }
    blocks
}

/// Runs a line of the guide in a shell that finds this build's `deepgen` first.
fn run(line: &str, folder: &Path) -> Output {
    let own = Path::new(env!("CARGO_BIN_EXE_deepgen")).parent().expect("a folder");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path =
        std::env::join_paths(std::iter::once(own.to_owned()).chain(std::env::split_paths(&path))).expect("a PATH");
    let mut command = Command::new("sh");
    command.args(["-e", "-c", line]).current_dir(folder).env("PATH", path).env_remove("RUST_LOG").stdin(Stdio::null());
    command.output().expect("a shell")
}

fn expect(line: &str, folder: &Path) -> String {
    let output = run(line, folder);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "`{line}` ended with {}:\n{said}", output.status);
    said
}

#[test]
fn every_command_of_the_guide_works() {
    let guide = fs::read_to_string("docs/guide.md").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut folder: PathBuf = dir.path().to_owned();
    let mut num_commands = 0;
    let has_python = run("python3 -c pass", dir.path()).status.success();
    for Block { info, text } in blocks(&guide) {
        let words: Vec<&str> = info.iter().map(String::as_str).collect();
        match words[..] {
            ["sh"] => {
                for line in text.lines() {
                    num_commands += 1;
                    match line.strip_prefix("cd ") {
                        Some(to) => folder.push(to),
                        None if line.contains("lengths") && !has_python => eprintln!("skipped, no python3: {line}"),
                        None => drop(expect(line, &folder)),
                    }
                }
            }
            [_, "file", path] => fs::write(folder.join(path), text).unwrap(),
            [_, "append", path] => {
                let before = fs::read_to_string(folder.join(path)).unwrap();
                fs::write(folder.join(path), before + &text).unwrap();
            }
            [_, "replace", path] => {
                let before = fs::read_to_string(folder.join(path)).unwrap();
                let (from, to) = text.trim_end().split_once('\n').unwrap();
                let after = before.lines().map(|line| if line.starts_with(from) { to } else { line });
                let after: String = after.map(|line| format!("{line}\n")).collect();
                assert_ne!(before, after, "{path} holds no `{from}`");
                fs::write(folder.join(path), after).unwrap();
            }
            _ => panic!("the guide has a block that nobody runs: {words:?}"),
        }
    }
    assert!(num_commands > 25, "{num_commands} commands");
}

#[test]
fn a_new_project_is_checked_and_planned_with_its_training_pipelines_too() {
    let dir = tempfile::tempdir().unwrap();
    expect("deepgen init new --training", dir.path());
    let project = dir.path().join("new");
    expect("deepgen check pipelines/*.toml experiments/*.toml stages/*.toml", &project);
    for file in ["pipelines/main.toml", "pipelines/base.toml", "pipelines/full.toml", "experiments/architecture.toml"] {
        expect(&format!("deepgen plan {file}"), &project);
    }
    let again = run("deepgen init new", dir.path());
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&again.stderr).contains("is there already; nothing was written"));
}

#[test]
fn the_doctor_names_what_is_missing_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let said = expect("deepgen doctor --worker no/such/worker", dir.path());
    for text in
        ["cpu", "memory", "disk", "no run goes on", "none at no/such/worker", "cargo build", "slurm", "no terminal"]
    {
        assert!(said.contains(text), "no `{text}` in:\n{said}");
    }
    let json = expect("deepgen doctor --worker no/such/worker --json 2>/dev/null", dir.path());
    let findings: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(findings.as_array().unwrap().iter().any(|finding| finding["about"] == "worker"));
}
