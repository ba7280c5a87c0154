//! The least that a runner does which keeps what a run is resumed and explained from: `floor DIR` runs the DAG of `DIR/dag.json`
//! two nodes at a time, with a folder, two logs, a hash and a manifest for each, moved into a store once it is whole, and a journal
//! that is durable before the first node and after the last.
//!
//! What a tool takes beyond this it takes for what it knows of a run: plan, state, progress, report. A yardstick of the benchmark: it
//! resumes nothing, checks nothing and stops at the first failure.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Condvar, Mutex};

use serde::Deserialize;

/// Nodes at a time, as for every tool of the benchmark.
const SLOTS: usize = 2;
/// Bytes of a line of the journal and of a manifest beside the hash, about those of deepgen.
const LINE_BYTES: usize = 250;
const MANIFEST_BYTES: usize = 1400;

#[derive(Deserialize)]
struct Node {
    id: usize,
    out: String,
    deps: Vec<String>,
}

/// What is ready, what waits for how many others, and how many are done.
struct Board {
    ready: VecDeque<usize>,
    waits: Vec<usize>,
    num_done: usize,
}

struct Run {
    root: PathBuf,
    nodes: Vec<Node>,
    /// Node of each result.
    makers: BTreeMap<String, usize>,
    journal: Mutex<File>,
}

fn main() -> io::Result<()> {
    let root = PathBuf::from(std::env::args_os().nth(1).expect("floor DIR"));
    let root = root.canonicalize()?;
    let nodes: Vec<Node> = serde_json::from_slice(&fs::read(root.join("dag.json"))?)?;
    let makers: BTreeMap<_, _> = nodes.iter().map(|node| (node.out.clone(), node.id)).collect();
    for folder in ["jobs", "store"] {
        fs::create_dir(root.join(folder))?;
    }
    let journal = File::create(root.join("journal"))?;
    journal.sync_data()?;
    let run = Run { root, nodes, makers, journal: Mutex::new(journal) };
    run.run()?;
    run.journal.into_inner().expect("no thread has panicked").sync_data()
}

impl Run {
    fn run(&self) -> io::Result<()> {
        let mut behind = vec![Vec::new(); self.nodes.len()];
        let mut waits = vec![0; self.nodes.len()];
        for node in &self.nodes {
            for maker in node.deps.iter().filter_map(|path| self.makers.get(path)) {
                behind[*maker].push(node.id);
                waits[node.id] += 1;
            }
        }
        let ready = (0..waits.len()).filter(|&node| waits[node] == 0).collect();
        let board = Mutex::new(Board { ready, waits, num_done: 0 });
        let has_changed = Condvar::new();
        let slot = || -> io::Result<()> {
            loop {
                let mut now = board.lock().expect("no thread has panicked");
                let node = loop {
                    match now.ready.pop_front() {
                        Some(node) => break node,
                        None if now.num_done == self.nodes.len() => return Ok(()),
                        None => now = has_changed.wait(now).expect("no thread has panicked"),
                    }
                };
                drop(now);
                self.run_node(&self.nodes[node]).unwrap_or_else(|error| {
                    eprintln!("node {node}: {error}");
                    std::process::exit(1);
                });
                let mut now = board.lock().expect("no thread has panicked");
                now.num_done += 1;
                for &next in &behind[node] {
                    now.waits[next] -= 1;
                    if now.waits[next] == 0 {
                        now.ready.push_back(next);
                    }
                }
                has_changed.notify_all();
            }
        };
        std::thread::scope(|scope| {
            let slots: Vec<_> = (0..SLOTS).map(|_| scope.spawn(slot)).collect();
            slots.into_iter().try_for_each(|slot| slot.join().expect("no thread has panicked"))
        })
    }

    fn run_node(&self, node: &Node) -> io::Result<()> {
        let job = self.root.join("jobs").join(named(node.id));
        let out = job.join("out");
        fs::create_dir(&job)?;
        fs::create_dir(&out)?;
        self.record()?;
        let log = |name: &str| File::create(job.join(name));
        let mut command = Command::new("/bin/sh");
        command.arg(self.root.join("node.sh")).arg(node.id.to_string()).arg(out.join("v"));
        command.args(node.deps.iter().map(|path| match self.makers.get(path) {
            Some(maker) => self.result(*maker).join("v"),
            None => self.root.join(path),
        }));
        let status = command.stdin(Stdio::null()).stdout(log("stdout.log")?).stderr(log("stderr.log")?).status()?;
        if !status.success() {
            return Err(io::Error::other(status.to_string()));
        }
        let hash = blake3::hash(&fs::read(out.join("v"))?);
        fs::write(out.join("manifest.json"), format!("{hash}{:MANIFEST_BYTES$}", ""))?;
        fs::rename(&out, self.result(node.id))?;
        self.record()
    }

    fn result(&self, node: usize) -> PathBuf {
        self.root.join("store").join(named(node))
    }

    fn record(&self) -> io::Result<()> {
        writeln!(self.journal.lock().expect("no thread has panicked"), "{:LINE_BYTES$}", "")
    }
}

/// Returns a folder's name, as long as a fingerprint.
fn named(node: usize) -> String {
    format!("{node:064}")
}
