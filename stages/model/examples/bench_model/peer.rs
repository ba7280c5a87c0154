//! The child process that computes the same with PyTorch: one JSON object a line each way (benches/model/peer.py).

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

use super::Failure;

/// A running peer.
pub struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// PyTorch's version.
    pub version: String,
}

impl Peer {
    /// Starts the script, whose models are made of plain functions or of a library's `modules`; fails when the program
    /// or torch is missing.
    pub fn start(python: &Path, script: &Path, modules: &str) -> Result<Self, Failure> {
        let mut child = Command::new(python)
            .arg(script)
            .arg(modules)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", python.display()))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("the child has no pipes".into());
        };
        let mut peer = Self { child, input, output: BufReader::new(output), version: String::new() };
        let hello = peer.receive().map_err(|_| format!("{} has no torch", python.display()))?;
        peer.version = hello["torch"].as_str().unwrap_or("?").into();
        Ok(peer)
    }

    fn receive(&mut self) -> Result<Value, Failure> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            return Err("PyTorch's side has died; its error stands above".into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn ask(&mut self, message: Value) -> Result<Value, Failure> {
        writeln!(self.input, "{message}")?;
        self.receive()
    }

    /// Gives it a case.
    pub fn load(&mut self, kind: &str, config: &Value, file: &Path) -> Result<(), Failure> {
        self.ask(json!({"command": "load", "kind": kind, "config": config, "file": file})).map(|_| ())
    }

    /// Has it write what it computes.
    pub fn check(&mut self, file: &Path) -> Result<(), Failure> {
        self.ask(json!({"command": "check", "file": file})).map(|_| ())
    }

    /// Has it run `what` a number of times; returns seconds.
    pub fn time(
        &mut self,
        what: &str,
        count: usize,
        threads: usize,
        uses_cpu_clock: bool,
    ) -> Result<Vec<f64>, Failure> {
        let message =
            json!({"command": "time", "what": what, "count": count, "threads": threads, "cpu": uses_cpu_clock});
        let answer = self.ask(message)?;
        Ok(serde_json::from_value(answer["seconds"].clone())?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // A peer that has died already cannot be told to.
        let _ = writeln!(self.input, "{}", json!({"command": "quit"}));
        let _ = self.child.wait();
    }
}
