//! Mutated pipeline, stage and experiment files: whatever stands in them, checking ends with problems and never with a
//! panic, an endless loop or a towering text.
//!
//! `make fuzz-spec` runs it for `DEEPGEN_FUZZ_SECONDS` (600) from the seed `DEEPGEN_FUZZ_SEED` (the time). A finding is
//! written to `target/fuzz-spec/` and can be checked again with `deepgen check`.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use deepgen::spec::{Overrides, Style, check, load, render};
use fastrand::Rng;

/// Longest time that one file may take, on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(300);
/// Longest file that mutations make, in bytes.
const LONGEST: usize = 1 << 15;

/// What the language is made of: pieces that a mutation puts in.
const TOKENS: &[&str] = &[
    "[",
    "]",
    "[[",
    "]]",
    "{",
    "}",
    "=",
    ".",
    ",",
    "\"",
    "'",
    "\"\"\"",
    "\n",
    "#",
    "true",
    "inf",
    "nan",
    "-1",
    "0",
    "1e308",
    "99999999999999999999",
    "0x7f",
    "1979-05-27",
    "\\u0000",
    "\u{feff}",
    "\u{1f600}",
    "${",
    "}",
    "$${",
    "${env.A}",
    "${a.b}",
    "${pipeline.seed}",
    "${captions.source.path}",
    "[env]\n",
    "[node.x]\n",
    "[node.\"captions[1]\"]\n",
    "[variant.v]\n",
    "[profile.tiny]\n",
    "[profile.tiny.node.captions]\n",
    "[[variant]]\n",
    "[axes]\n",
    "include = [\"good.toml\"]\n",
    "stage = \"mix\"\n",
    "inputs = { a = \"captions\" }\n",
    "needs = [\"captions\"]\n",
    "when = { profile = \"tiny\" }\n",
    "when = { not = { any = [true, false] } }\n",
    "over = { nominal_size = [1, 2] }\n",
    "zip = [[\"a\", \"a\"]]\n",
    "exclude = [{ nominal_size = 1 }]\n",
    "extends = \"tiny\"\n",
    "slots = { gpu = [0] }\n",
    "timeout = \"1h\"\n",
    "kind = \"train\"\n",
    "use = \"v\"\n",
    "a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.r = 1\n",
];

fn seeds() -> Vec<(String, String)> {
    let bad = Path::new("tests/fixtures/bad");
    let folders = [
        (PathBuf::from("pipelines"), "pipelines"),
        (PathBuf::from("stages"), "stages"),
        (PathBuf::from("experiments"), "experiments"),
        (PathBuf::from("tests/fixtures/spec/pipelines"), "pipelines"),
        (bad.join("pipelines"), "pipelines"),
        (bad.join("stages"), "stages"),
        (bad.join("experiments"), "experiments"),
    ];
    let mut seeds = Vec::new();
    for (folder, kind) in folders {
        let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        for file in files.into_iter().filter(|file| file.extension().is_some_and(|end| end == "toml")) {
            seeds.push((kind.to_owned(), fs::read_to_string(file).unwrap()));
        }
    }
    seeds
}

/// Changes a text once: bytes, lines or pieces of the language, or a stretch of another file.
fn mutate(text: &mut String, other: &str, rng: &mut Rng) {
    let place = |text: &str, rng: &mut Rng| {
        let mut at = rng.usize(0..=text.len());
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    let lines = |text: &str| text.split_inclusive('\n').map(str::to_owned).collect::<Vec<_>>();
    match rng.u8(0..9) {
        0 => {
            let at = place(text, rng);
            text.insert_str(at, rng.choice(TOKENS).expect("there are tokens"));
        }
        1 => {
            let (from, to) = (place(text, rng), place(text, rng));
            let (from, to) = (from.min(to), from.max(to).min(from.min(to) + 40));
            let to = (to..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
            text.replace_range(from..to, "");
        }
        2 => {
            let at = place(text, rng);
            text.insert(at, char::from(rng.u8(0..128)));
        }
        3 | 4 => {
            let mut all = lines(text);
            if !all.is_empty() {
                let (from, to) = (rng.usize(0..all.len()), rng.usize(0..all.len()));
                if rng.bool() { all.swap(from, to) } else { all.insert(to, all[from].clone()) }
            }
            *text = all.concat();
        }
        5 => {
            let mut all = lines(text);
            if !all.is_empty() {
                all.remove(rng.usize(0..all.len()));
            }
            *text = all.concat();
        }
        6 => {
            let theirs = lines(other);
            if !theirs.is_empty() {
                let from = rng.usize(0..theirs.len());
                let stretch = theirs[from..(from + rng.usize(1..8)).min(theirs.len())].concat();
                let at = text.find('\n').map_or(0, |_| {
                    let all = lines(text);
                    all[..rng.usize(0..=all.len())].concat().len()
                });
                text.insert_str(at, &stretch);
            }
        }
        // A word is exchanged for another word of the file, or for a piece of the language.
        7 => {
            let words: Vec<&str> =
                text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| !w.is_empty()).collect();
            if let (Some(old), Some(new)) = (rng.choice(&words), rng.choice(&words)) {
                let new =
                    if rng.bool() { (*new).to_owned() } else { (*rng.choice(TOKENS).expect("tokens")).to_owned() };
                *text = text.replacen(*old, &new, rng.usize(1..3));
            }
        }
        _ => {
            let at = place(text, rng);
            text.truncate(at);
        }
    }
    let mut end = text.len().min(LONGEST);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

/// Checks one file; returns what went wrong with that.
fn trial(file: &Path) -> Option<String> {
    let begun = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let text = fs::read_to_string(file).expect("it was written");
        let problems = check(file, &Overrides::default());
        drop(render(&problems, Style::Plain));
        let loaded = load(file, &Overrides::default());
        // A stage file is no pipeline, which only loading says.
        let is_stage = file.parent().is_some_and(|folder| folder.ends_with("stages"));
        if problems.is_empty() && loaded.is_err() && !is_stage && !text.contains("kind") {
            return Some("checking finds nothing, loading does".to_owned());
        }
        None
    }));
    let spent = begun.elapsed();
    match outcome {
        Err(panic) => Some(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic".to_owned())),
        Ok(Some(wrong)) => Some(wrong),
        Ok(None) => (spent > PATIENCE).then(|| format!("it took {spent:?}")),
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn fuzz(seconds: u64, seed: u64) -> u64 {
    let project = tempfile::tempdir().unwrap();
    for folder in ["pipelines", "stages", "experiments"] {
        fs::create_dir(project.path().join(folder)).unwrap();
    }
    let good = include_str!("fixtures/bad/pipelines/good.toml");
    fs::write(project.path().join("pipelines/good.toml"), good).unwrap();
    let seeds = seeds();
    let mut rng = Rng::with_seed(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut num = 0;
    while Instant::now() < end {
        let (kind, text) = rng.choice(&seeds).expect("there are seeds");
        let mut text = text.clone();
        let (_, other) = rng.choice(&seeds).expect("there are seeds");
        for _ in 0..rng.usize(1..6) {
            mutate(&mut text, other, &mut rng);
        }
        let file = project.path().join(kind).join("fuzz.toml");
        fs::write(&file, &text).unwrap();
        // Kept before the trial: an overflow of the stack ends the program.
        let kept = Path::new("target/fuzz-spec");
        fs::create_dir_all(kept).unwrap();
        fs::write(kept.join("last.toml"), &text).unwrap();
        if let Some(wrong) = trial(&file) {
            let finding = kept.join(format!("{kind}-{seed}-{num}.toml"));
            fs::write(&finding, &text).unwrap();
            panic!("{wrong}: {} (seed {seed}, file {num})", finding.display());
        }
        fs::remove_file(&file).unwrap();
        num += 1;
    }
    num
}

#[test]
fn a_few_mutated_files_panic_nowhere() {
    assert!(fuzz(2, 1) > 0);
}

#[test]
#[ignore = "takes ten minutes: make fuzz-spec"]
fn ten_minutes_of_mutated_files_panic_nowhere() {
    let seconds = number("DEEPGEN_FUZZ_SECONDS").unwrap_or(600);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let seed = number("DEEPGEN_FUZZ_SEED").unwrap_or(now);
    let num = fuzz(seconds, seed);
    println!("{num} files in {seconds} s from seed {seed}: no panic");
}
