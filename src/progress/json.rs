//! Progress for programs: every event as a JSON line on standard output, the summary as the last line.

use std::io::Write;

use deepgen_contract::event::WorkerEvent;
use deepgen_contract::id::NodeName;
use serde_json::json;

use super::progress::{Progress, Summary};
use crate::run::event::RunEvent;

/// Writes a JSON object a line, told apart by `source`: `run`, `worker`, `note` or `summary`.
#[derive(Debug)]
pub struct Json<W> {
    out: W,
}

impl<W: Write> Json<W> {
    /// Returns progress that writes to `out`.
    pub fn new(out: W) -> Self {
        Self { out }
    }

    fn line(&mut self, value: &serde_json::Value) {
        // A reader that went away must not stop the run.
        if let Err(error) = writeln!(self.out, "{value}").and_then(|()| self.out.flush()) {
            tracing::debug!(%error, "nobody reads the events");
        }
    }
}

impl<W: Write> Progress for Json<W> {
    fn run_event(&mut self, ts_ms: u64, event: &RunEvent) {
        self.line(&json!({ "source": "run", "ts_ms": ts_ms, "event": event }));
    }

    fn worker_event(&mut self, node: &NodeName, attempt: u32, event: &WorkerEvent) {
        let WorkerEvent { ts_ms, event } = event;
        self.line(&json!({ "source": "worker", "ts_ms": ts_ms, "node": node, "attempt": attempt, "event": event }));
    }

    fn note(&mut self, message: &str) {
        self.line(&json!({ "source": "note", "message": message }));
    }

    fn tick(&mut self, _now_ms: u64) {}

    fn summary(&mut self, summary: &Summary) {
        self.line(&json!({ "source": "summary", "summary": summary }));
    }
}
