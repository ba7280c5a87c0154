//! The loop of a run, and the program's only `select!`: workers' reports, sealed results, signals and time go into the
//! scheduler, its actions go out into the world.
//!
//! Decides nothing. A state is written into the journal before anything that follows from it happens, and durable before
//! anybody is told: see [`Recorder`].

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use deepgen_contract::artifact::{Environment, Manifest};
use deepgen_contract::id::NodeName;
use deepgen_contract::job::{FailureCause, FrozenCache, JOB_VERSION, JobInput, JobRemedies, JobSpec, Outcome};
use deepgen_contract::stage::StageKind;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

use super::event::{Failure, NodeState, RunEvent, RunResult};
use super::scheduler::{Action, Cancel, Ended, Event, Scheduler};
use super::sealing::Sealing;
use super::slots::GPU;
use crate::exec::jobdir::JobDir;
use crate::exec::{Executor, Report, What};
use crate::plan::{Plan, PlannedNode};
use crate::progress::Progress;
use crate::progress::format::now_ms;
use crate::store::state::StateError;
use crate::store::{ArtifactStore, Layout, Links, Recorder};

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
    /// Who remembers what is sealed.
    pub store: &'a ArtifactStore,
    /// Project folder, absolute.
    pub root: PathBuf,
    /// Where things lie; its root is absolute.
    pub layout: Layout,
    /// What comes next; its nodes stand in the order of the plan.
    pub scheduler: Scheduler,
    /// Who starts workers.
    pub executor: Box<dyn Executor>,
    /// What the executor reports.
    pub reports: UnboundedReceiver<Report>,
    /// Where events become durable.
    pub recorder: Recorder,
    /// Links from the run's folder to results.
    pub links: Arc<Links>,
    /// Who watches.
    pub progress: &'a mut dyn Progress,
    /// Where jobs that train keep what frozen parts compute.
    pub frozen_cache: Option<FrozenCache>,
    /// What manifests say of this machine.
    pub environment: Environment,
    /// Events that are written and not durable yet, each with its line and its time.
    pub untold: VecDeque<(u64, u64, RunEvent)>,
    /// Who waits for the last line of the journal to be written: it can be read from then on, and becomes durable meanwhile.
    pub is_written: std::sync::mpsc::Sender<()>,
    /// True when the end of the terminal does not concern the run.
    pub ignores_hangup: bool,
}

/// The result of sealing in the background.
type Sealed = (NodeName, u32, Result<Manifest, String>);

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
        let mut result = self.handle(vec![Event::Begin], &seals_in)?;
        while result.is_none() {
            let event = tokio::select! {
                durable = self.recorder.durable() => {
                    self.tell(durable?);
                    None
                }
                Some(report) = self.reports.recv() => self.hear(report),
                Some(sealed) = seals.recv() => Some(self.after_sealing(sealed)),
                _ = interrupt.recv() => Some(self.stop()),
                _ = terminate.recv() => Some(self.stop()),
                _ = hangup.recv() => self.hang_up(),
                _ = ticker.tick() => {
                    self.progress.tick(now_ms());
                    Some(Event::Tick)
                }
            };
            // Whatever else has happened meanwhile is written down together with it.
            let mut events: Vec<Event> = event.into_iter().collect();
            while let Ok(sealed) = seals.try_recv() {
                events.push(self.after_sealing(sealed));
            }
            while let Ok(report) = self.reports.try_recv() {
                events.extend(self.hear(report));
            }
            if !events.is_empty() {
                result = self.handle(events, &seals_in)?;
            }
        }
        self.recorder.hurry();
        // Nobody may care.
        let _ = self.is_written.send(());
        while !self.recorder.is_durable() {
            let durable = self.recorder.durable().await?;
            self.tell(durable);
        }
        Ok((result.unwrap_or(RunResult::Stopped), self.scheduler, self.recorder))
    }

    /// Passes on what a worker said; returns the event for the scheduler when its attempt ended.
    fn hear(&mut self, report: Report) -> Option<Event> {
        let Report { node, attempt, what } = report;
        match what {
            What::Said(events) => {
                events.iter().for_each(|event| self.progress.worker_event(&node, attempt, event));
                Some(Event::Heard { node })
            }
            What::Ended(ended) => Some(Event::Ended { node, attempt, ended }),
            What::Sealed(sealed) => Some(self.after_sealing((node, attempt, *sealed))),
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

    /// Gives events to the scheduler and performs what comes out, until nothing more comes of it.
    fn handle(&mut self, events: Vec<Event>, seals: &UnboundedSender<Sealed>) -> Result<Option<RunResult>, DriveError> {
        let (mut events, mut result) = (events, None);
        while !events.is_empty() {
            let now = now_ms();
            let (mut happened, mut actions) = (Vec::new(), Vec::new());
            let decided: Vec<Action> = events.drain(..).flat_map(|event| self.scheduler.on(event, now)).collect();
            for action in decided {
                match action {
                    Action::Set { node, state } => happened.extend(self.happened(node, state)),
                    Action::Finish(how) => {
                        happened.push(RunEvent::RunFinished { result: how });
                        result = Some(how);
                    }
                    action => actions.push(action),
                }
            }
            let seq = self.recorder.record(&happened, now)?;
            self.untold.extend(happened.into_iter().map(|event| (seq, now, event)));
            events.extend(actions.into_iter().filter_map(|action| self.act(action, seals)));
        }
        Ok(result)
    }

    /// Returns what is worth a line: that a node is ready follows from others.
    fn happened(&self, node: NodeName, state: NodeState) -> Option<RunEvent> {
        let is_told = !matches!(state, NodeState::Ready | NodeState::Waiting);
        is_told.then(|| RunEvent::Node { fingerprint: self.planned(&node).fingerprint, node, state })
    }

    /// Shows what has become durable.
    fn tell(&mut self, durable: u64) {
        while let Some((seq, ts_ms, event)) = self.untold.pop_front() {
            if seq > durable {
                self.untold.push_front((seq, ts_ms, event));
                break;
            }
            self.progress.run_event(ts_ms, &event);
        }
    }

    /// Performs an action; returns an event when it failed at once.
    fn act(&mut self, action: Action, seals: &UnboundedSender<Sealed>) -> Option<Event> {
        match action {
            Action::Set { .. } | Action::Finish(_) => None,
            Action::Launch { node, attempt, slot_ids, remedies } => {
                let job = JobSpec { slot_ids, remedies, ..self.job(&node, attempt) };
                let job = JobSpec { device: on_own_gpu(&job), ..job };
                let seal = self.sealing(&node, attempt);
                let error = self.executor.launch(job, Box::new(move |outcome| seal(Some(outcome)))).err()?;
                let failure = Failure { cause: FailureCause::Io, message: error.to_string() };
                Some(Event::Ended { node, attempt, ended: Ended::Failed(failure) })
            }
            Action::Attach { node, attempt } => {
                let job = self.job(&node, attempt);
                self.executor.attach(job);
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
        let sealing = self.sealing(&node, attempt);
        tokio::task::spawn_blocking(move || {
            // The loop ends only after every sealing has reported.
            let _ = seals.send((node, attempt, sealing(None)));
        });
    }

    /// Returns the work of sealing an attempt, whose outcome is read from its folder when nobody knows it.
    fn sealing(
        &self,
        node: &NodeName,
        attempt: u32,
    ) -> impl FnOnce(Option<Outcome>) -> Result<Manifest, String> + use<> {
        let sealing = Sealing {
            layout: self.layout.clone(),
            node: self.planned(node).clone(),
            attempt,
            environment: self.environment.clone(),
        };
        let links = Arc::clone(&self.links);
        move |outcome| {
            let sealed = match outcome {
                Some(outcome) => sealing.seal(outcome),
                None => sealing.run(),
            };
            let sealed = sealed.map_err(|error| error.to_string())?;
            links.make(&sealed.node, &sealed.fingerprint);
            Ok(sealed)
        }
    }

    fn after_sealing(&self, (node, attempt, sealed): Sealed) -> Event {
        match sealed {
            Ok(manifest) => {
                self.store.remember(&manifest);
                Event::Sealed { node, attempt }
            }
            Err(message) => {
                let failure =
                    Failure { cause: FailureCause::Io, message: format!("its result cannot be sealed: {message}") };
                Event::Ended { node, attempt, ended: Ended::Failed(failure) }
            }
        }
    }

    fn planned(&self, node: &NodeName) -> &PlannedNode {
        let place = self.scheduler.board().at(node).expect("the scheduler knows the nodes of the plan and no others");
        &self.plan.nodes[place]
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
        let attempts = if attempt > 1 { dir.attempts() } else { Vec::new() };
        let is_training = matches!(resolved.kind, StageKind::Train | StageKind::Rl);
        let earlier = attempts.into_iter().filter(|earlier| *earlier < attempt);
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
            peak_tflops: resolved.peak_tflops,
            frozen_cache: self.frozen_cache.clone().filter(|_| is_training),
            remedies: JobRemedies::default(),
        }
    }
}

/// Returns the job's device with the index of the GPU that it was given, unless the pipeline names one.
fn on_own_gpu(job: &JobSpec) -> String {
    let given = job.slot_ids.get(GPU).and_then(|ids| ids.first());
    match given.filter(|_| matches!(job.device.as_str(), "cuda" | "wgpu")) {
        Some(id) => format!("{}:{id}", job.device),
        None => job.device.clone(),
    }
}
