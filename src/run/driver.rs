//! The loop of a run, and the program's only `select!`: workers' reports, sealed results, signals and time go into the
//! scheduler, its actions go out into the world.
//!
//! Decides nothing. A state is journaled and synced before anything that follows from it happens.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use deepgen_contract::artifact::Environment;
use deepgen_contract::id::NodeName;
use deepgen_contract::job::{FailureCause, JOB_VERSION, JobInput, JobRemedies, JobSpec};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

use super::event::{Failure, RunEvent, RunResult};
use super::scheduler::{Action, Cancel, Ended, Event, Scheduler};
use super::sealing::Sealing;
use crate::exec::jobdir::JobDir;
use crate::exec::{Executor, Report, What};
use crate::plan::{Plan, PlannedNode};
use crate::progress::Progress;
use crate::progress::format::now_ms;
use crate::store::state::StateError;
use crate::store::{Layout, Recorder, layout};

/// Time between two looks at the clock: retries and drawing.
const TICK: Duration = Duration::from_millis(200);

/// A run that cannot go on, whatever its nodes do.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// What happened cannot be written down.
    #[error("cannot record what happened")]
    Record(#[from] StateError),
    /// Signals cannot be listened to.
    #[error("cannot listen to signals")]
    Signals(#[source] io::Error),
}

/// Everything a run needs of the world.
pub struct Driver<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// Project folder, absolute.
    pub root: PathBuf,
    /// Where things lie; its root is absolute.
    pub layout: Layout,
    /// What comes next.
    pub scheduler: Scheduler,
    /// Who starts workers.
    pub executor: Box<dyn Executor>,
    /// What the executor reports.
    pub reports: UnboundedReceiver<Report>,
    /// Where events become durable.
    pub recorder: Recorder,
    /// Who watches.
    pub progress: &'a mut dyn Progress,
    /// What manifests say of this machine.
    pub environment: Environment,
    /// True when the end of the terminal does not concern the run.
    pub ignores_hangup: bool,
}

/// The result of sealing in the background.
type Sealed = (NodeName, u32, Result<(), String>);

impl Driver<'_> {
    /// Runs the plan to its end and returns how it ended, with the scheduler and the recorder in their last state.
    ///
    /// # Errors
    /// When events cannot be made durable; workers that run are left alone and found by the next run.
    pub async fn drive(mut self) -> Result<(RunResult, Scheduler, Recorder), DriveError> {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(DriveError::Signals)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(DriveError::Signals)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(DriveError::Signals)?;
        let (seals_in, mut seals) = mpsc::unbounded_channel();
        let mut ticker = tokio::time::interval(TICK);
        ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut result = self.handle(Event::Begin, &seals_in)?;
        while result.is_none() {
            let event = tokio::select! {
                Some(report) = self.reports.recv() => self.hear(report),
                Some(sealed) = seals.recv() => Some(after_sealing(sealed)),
                _ = interrupt.recv() => Some(self.stop()),
                _ = terminate.recv() => Some(self.stop()),
                _ = hangup.recv() => self.hang_up(),
                _ = ticker.tick() => {
                    self.progress.tick(now_ms());
                    Some(Event::Tick)
                }
            };
            if let Some(event) = event {
                result = self.handle(event, &seals_in)?;
            }
        }
        Ok((result.unwrap_or(RunResult::Stopped), self.scheduler, self.recorder))
    }

    /// Passes on what a worker said; returns the event for the scheduler when its attempt ended.
    fn hear(&mut self, report: Report) -> Option<Event> {
        let Report { node, attempt, what } = report;
        match what {
            What::Said(events) => {
                events.iter().for_each(|event| self.progress.worker_event(&node, attempt, event));
                None
            }
            What::Ended(ended) => Some(Event::Ended { node, attempt, ended }),
        }
    }

    /// Stops gently when the terminal has gone. Shell and kernel may both say so, which is no second request.
    fn hang_up(&mut self) -> Option<Event> {
        (!self.ignores_hangup && !self.scheduler.is_stopping()).then(|| self.stop())
    }

    fn stop(&mut self) -> Event {
        if self.scheduler.is_stopping() {
            self.progress.note("stopping at once");
            return Event::Stop { how: Cancel::AtOnce };
        }
        self.progress.note("stopping: workers write a checkpoint first; once more to stop at once");
        Event::Stop { how: Cancel::Gently }
    }

    /// Gives an event to the scheduler and performs what comes out, until nothing more comes of it.
    fn handle(&mut self, event: Event, seals: &UnboundedSender<Sealed>) -> Result<Option<RunResult>, DriveError> {
        let mut events = VecDeque::from([event]);
        let mut result = None;
        while let Some(event) = events.pop_front() {
            let mut unrecorded = Vec::new();
            for action in self.scheduler.on(event, now_ms()) {
                if let Action::Set { node, state } = action {
                    let fingerprint = self.planned(&node).fingerprint;
                    unrecorded.push(RunEvent::Node { node, fingerprint, state });
                    continue;
                }
                if let Action::Finish(how) = action {
                    unrecorded.push(RunEvent::RunFinished { result: how });
                    result = Some(how);
                }
                self.record(&mut unrecorded)?;
                events.extend(self.act(action, seals));
            }
            self.record(&mut unrecorded)?;
        }
        Ok(result)
    }

    /// Makes events durable, then shows them.
    fn record(&mut self, events: &mut Vec<RunEvent>) -> Result<(), DriveError> {
        let now = now_ms();
        self.recorder.record(events, now)?;
        events.drain(..).for_each(|event| self.progress.run_event(now, &event));
        Ok(())
    }

    /// Performs an action; returns an event when it failed at once.
    fn act(&mut self, action: Action, seals: &UnboundedSender<Sealed>) -> Option<Event> {
        match action {
            Action::Set { .. } | Action::Finish(_) => None,
            Action::Launch { node, attempt } => {
                let job = self.job(&node, attempt);
                let error = self.executor.launch(&job).err()?;
                let failure = Failure { cause: FailureCause::Io, message: error.to_string() };
                Some(Event::Ended { node, attempt, ended: Ended::Failed(failure) })
            }
            Action::Attach { node, attempt } => {
                let fingerprint = self.planned(&node).fingerprint;
                self.executor.attach(&node, &fingerprint, attempt);
                None
            }
            Action::Cancel { node, how, .. } => {
                self.executor.cancel(&node, how);
                None
            }
            Action::Seal { node, attempt } => {
                self.seal(node, attempt, seals.clone());
                None
            }
        }
    }

    fn seal(&self, node: NodeName, attempt: u32, seals: UnboundedSender<Sealed>) {
        let sealing = Sealing {
            layout: self.layout.clone(),
            node: self.planned(&node).clone(),
            attempt,
            environment: self.environment.clone(),
            now_ms: now_ms(),
        };
        let link = self.recorder.run_dir().join(layout::NODES_DIR);
        tokio::task::spawn_blocking(move || {
            let fingerprint = sealing.node.fingerprint;
            let sealed = sealing.run().map(|_| link_node(&link, &node, &fingerprint.to_string()));
            // The loop ends only after every sealing has reported.
            let _ = seals.send((node, attempt, sealed.map_err(|error| error.to_string())));
        });
    }

    fn planned(&self, node: &NodeName) -> &PlannedNode {
        let found = self.plan.nodes.iter().find(|planned| planned.node.name == *node);
        found.expect("the scheduler knows the nodes of the plan and no others")
    }

    /// Returns the description of a node's job.
    fn job(&self, node: &NodeName, attempt: u32) -> JobSpec {
        let planned = self.planned(node);
        let resolved = &planned.node;
        let input = |(port, producer): (&String, &NodeName)| {
            let source = self.planned(producer);
            let input = JobInput {
                kind: source.node.settings.output(),
                path: self.layout.artifact(&source.fingerprint),
                fingerprint: source.fingerprint,
                node: producer.clone(),
            };
            (port.clone(), input)
        };
        let dir = JobDir::new(&self.layout.jobs(), &planned.fingerprint);
        let earlier = dir.attempts().into_iter().filter(|earlier| *earlier < attempt);
        JobSpec {
            version: JOB_VERSION,
            node: node.clone(),
            stage: resolved.stage.clone(),
            fingerprint: planned.fingerprint,
            attempt,
            seed: resolved.seed,
            device: if resolved.settings.uses_device() { resolved.device.clone() } else { "cpu".into() },
            threads: resolved.threads,
            project_root: self.root.clone(),
            settings: resolved.settings.clone(),
            inputs: resolved.inputs.iter().map(input).collect::<BTreeMap<_, _>>(),
            earlier_attempts: earlier.map(|earlier| dir.attempt(earlier)).collect(),
            slot_ids: BTreeMap::new(),
            remedies: JobRemedies::default(),
        }
    }
}

fn after_sealing((node, attempt, sealed): Sealed) -> Event {
    match sealed {
        Ok(()) => Event::Sealed { node, attempt },
        Err(message) => {
            let failure =
                Failure { cause: FailureCause::Io, message: format!("its result cannot be sealed: {message}") };
            Event::Ended { node, attempt, ended: Ended::Failed(failure) }
        }
    }
}

/// Links a node's name to its artifact in the run's folder, for people who look around there.
pub fn link_node(folder: &std::path::Path, node: &NodeName, fingerprint: &str) {
    let name = node.0.replace('/', "_");
    let link = || {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(name);
        if path.symlink_metadata().is_ok() {
            std::fs::remove_file(&path)?;
        }
        std::os::unix::fs::symlink(format!("../../../store/{fingerprint}"), path)
    };
    if let Err(error) = link() {
        tracing::debug!(%node, %error, "no link to the artifact");
    }
}
