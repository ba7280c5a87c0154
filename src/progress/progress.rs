//! The trait through which a run shows itself, and the summary at its end.
//!
//! The run loop never prints; everything it has to say goes through here. Progress goes to standard error, the summary
//! to standard output.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use deepgen_contract::event::WorkerEvent;
use deepgen_contract::id::NodeName;
use serde::Serialize;

use super::format::{count, duration};
use super::json::Json;
use super::live::Live;
use super::plain::Plain;
use crate::run::event::{RunEvent, RunResult};

/// Someone who watches a run.
pub trait Progress {
    /// The run has so many nodes.
    fn begin(&mut self, _num_nodes: usize) {}
    /// Something happened to the run or one of its nodes; it is durable already.
    fn run_event(&mut self, ts_ms: u64, event: &RunEvent);
    /// A worker said something.
    fn worker_event(&mut self, node: &NodeName, attempt: u32, event: &WorkerEvent);
    /// A remark about the run as a whole.
    fn note(&mut self, message: &str);
    /// Time has passed: a chance to draw.
    fn tick(&mut self, now_ms: u64);
    /// The run is over.
    fn summary(&mut self, summary: &Summary);
}

/// How a run ended, in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Name of the run.
    pub run: String,
    /// How it ended.
    pub result: RunResult,
    /// Nodes that workers computed in this process or that it sealed.
    pub num_ran: usize,
    /// Nodes whose results were there.
    pub num_cached: usize,
    /// Nodes that failed.
    pub num_failed: usize,
    /// Nodes that wait for another that failed or was stopped.
    pub num_left: usize,
    /// Seconds since this process began with the run.
    pub seconds: f64,
    /// Seconds that the cached results took when they were made.
    pub saved_seconds: f64,
    /// Failed nodes with their messages.
    pub failures: Vec<(NodeName, String)>,
    /// Folder of the run.
    pub run_dir: PathBuf,
    /// The report, when one was written.
    pub report: Option<PathBuf>,
}

impl Summary {
    /// Prints the text on standard output; a reader that has gone is no error of the run.
    pub fn print(&self) {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(self.text().as_bytes()).and_then(|()| out.flush());
    }

    /// Returns the lines printed at the end.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (node, message) in &self.failures {
            text.push_str(&format!("{node} failed: {message}\n"));
        }
        let mut parts = vec![format!("{} ran", self.num_ran), format!("{} cached", self.num_cached)];
        if self.num_failed > 0 {
            parts.push(format!("{} failed", self.num_failed));
        }
        if self.num_left > 0 {
            parts.push(format!("{} left", self.num_left));
        }
        text.push_str(&format!("{}: {} in {}", self.result.word(), parts.join(", "), duration(self.seconds)));
        if self.num_cached > 0 && self.saved_seconds >= 1.0 {
            text.push_str(&format!(
                "; {} saved {}",
                count(self.num_cached, "cached node"),
                duration(self.saved_seconds)
            ));
        }
        text.push('\n');
        if self.result == RunResult::Stopped {
            text.push_str("the same command goes on from the newest checkpoints\n");
        }
        match &self.report {
            Some(report) => text.push_str(&format!("report: {}\n", report.display())),
            None => text.push_str(&format!("run: {}\n", self.run_dir.display())),
        }
        text
    }
}

/// Returns the watcher for this command line and this standard error.
pub fn choose(is_json: bool, is_quiet: bool) -> Box<dyn Progress> {
    match (is_json, is_quiet) {
        (true, _) => Box::new(Json::new(std::io::stdout())),
        (false, true) => Box::new(Plain::quiet()),
        (false, false) if std::io::stderr().is_terminal() => Box::new(Live::new()),
        (false, false) => Box::new(Plain::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_says_what_ran_what_was_saved_and_where_the_report_is() {
        let mut summary = Summary {
            run: "r".into(),
            result: RunResult::Done,
            num_ran: 2,
            num_cached: 1,
            num_failed: 0,
            num_left: 0,
            seconds: 3.25,
            saved_seconds: 125.0,
            failures: vec![],
            run_dir: "artifacts/runs/r".into(),
            report: Some("artifacts/runs/r/report.html".into()),
        };
        insta::assert_snapshot!(summary.text(), @r"
        done: 2 ran, 1 cached in 3.2 s; 1 cached node saved 2 min 5 s
        report: artifacts/runs/r/report.html
        ");
        summary.result = RunResult::Failed;
        summary.num_failed = 1;
        summary.num_left = 3;
        summary.num_cached = 0;
        summary.failures = vec![(NodeName("sft".into()), "loss is NaN at step 7".into())];
        summary.report = None;
        insta::assert_snapshot!(summary.text(), @r"
        sft failed: loss is NaN at step 7
        failed: 2 ran, 0 cached, 1 failed, 3 left in 3.2 s
        run: artifacts/runs/r
        ");
    }
}
