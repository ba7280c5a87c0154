//! Jobs of the `command` stage: from settings and a job to a process, and from its end to an outcome.
//!
//! Fills in placeholders and reads what the program left; starting and following it is [`super::local`]'s.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use deepgen_contract::command::{CommandSettings, Piece, Placeholder, pieces, shell_word};
use deepgen_contract::job::{FailureCause, JobSpec, OUT_DIR, Outcome};
use serde_json::Value;

/// Exit status of a shell line inside its attempt: what remains of it when nobody waits for the process.
pub const EXIT_FILE: &str = "exit";

/// Where the programs lie that are named without a folder. Each is looked for once: a child that looks for itself tries to
/// become a file in every folder of `PATH`.
#[derive(Debug, Default)]
pub struct Programs(Mutex<BTreeMap<String, Option<PathBuf>>>);

impl Programs {
    /// Returns a program's file, or its name when that says where it lies or nothing is found.
    fn find(&self, name: &str) -> PathBuf {
        if name.contains('/') {
            return name.into();
        }
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known.entry(name.to_owned()).or_insert_with(|| which::which(name).ok());
        found.clone().unwrap_or_else(|| name.into())
    }
}

/// Returns the process of a command; it starts in its attempt's folder, which is `folder`.
pub fn process(settings: &CommandSettings, job: &JobSpec, folder: &Path, programs: &Programs) -> Command {
    let fill = |text: &str, is_shell| filled(text, job, folder, is_shell);
    let mut command = match settings.argv.split_first() {
        Some((program, arguments)) => {
            let name = fill(program, false);
            // With a `PATH` of its own it is looked for there, when it starts.
            let path = if settings.env.contains_key("PATH") { name.clone().into() } else { programs.find(&name) };
            let mut command = Command::new(path);
            command.arg0(name);
            command.args(arguments.iter().map(|text| fill(text, false)));
            command
        }
        None => {
            let exit = shell_word(&folder.join(EXIT_FILE).to_string_lossy());
            let trap = shell_word(&format!("echo $? >{exit}"));
            let mut command = Command::new("/bin/sh");
            command.arg("-ec").arg(format!("trap {trap} EXIT\n{}", fill(&settings.shell, true)));
            command
        }
    };
    command.current_dir(folder);
    for (name, text) in &settings.env {
        command.env(name, fill(text, false));
    }
    if let Some(gpus) = job.slot_ids.get("gpu") {
        let gpus: Vec<String> = gpus.iter().map(u32::to_string).collect();
        command.env("CUDA_VISIBLE_DEVICES", gpus.join(","));
    }
    command
}

fn filled(text: &str, job: &JobSpec, folder: &Path, is_shell: bool) -> String {
    let mut all = String::new();
    // A template that does not parse was refused before anything ran.
    for piece in pieces(text).unwrap_or_default() {
        let value = match piece {
            Piece::Text(text) => {
                all.push_str(text);
                continue;
            }
            Piece::Placeholder(placeholder) => match placeholder {
                Placeholder::Input(port) => job.inputs.get(port).map_or_else(String::new, |input| shown(&input.path)),
                Placeholder::Out => shown(&folder.join(OUT_DIR)),
                Placeholder::Seed => job.seed.to_string(),
                Placeholder::Threads => job.threads.to_string(),
                Placeholder::Device => device(job),
                Placeholder::Root => shown(&job.project_root),
                Placeholder::Job => shown(folder),
            },
        };
        all.push_str(&if is_shell { shell_word(&value) } else { value });
    }
    all
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Returns the device as the program counts them: a CUDA program sees only the GPUs that its node has.
fn device(job: &JobSpec) -> String {
    let is_masked = job.slot_ids.contains_key("gpu") && job.device.starts_with("cuda");
    if is_masked { "cuda:0".into() } else { job.device.clone() }
}

/// Returns how an attempt ended whose program did: declared outputs must be there, metrics must read.
pub fn conclude(settings: &CommandSettings, folder: &Path, end: End, seconds: f64) -> Outcome {
    match end.code {
        Some(code) if settings.is_success(code) => match results(settings, &folder.join(OUT_DIR)) {
            Ok(metrics) => Outcome::Done { metrics, notes: Vec::new(), seconds, throughput: BTreeMap::new() },
            Err(message) => Outcome::Failed { cause: FailureCause::Program, message },
        },
        Some(code) => Outcome::Failed {
            cause: FailureCause::Program,
            message: format!("the program ended with exit code {code}{}", end.last_words),
        },
        None => Outcome::Failed {
            cause: FailureCause::Lost,
            message: "its exit status is unknown: it ended while no orchestrator watched; a `shell` line keeps it"
                .into(),
        },
    }
}

/// What is known of a program's end.
#[derive(Debug, Clone)]
pub struct End {
    /// Its exit code, if anybody saw it.
    pub code: Option<i32>,
    /// The end of its standard error, for messages.
    pub last_words: String,
}

/// Returns the exit code that a shell line wrote down.
pub fn written_code(folder: &Path) -> Option<i32> {
    fs::read_to_string(folder.join(EXIT_FILE)).ok()?.trim().parse().ok()
}

fn results(settings: &CommandSettings, out: &Path) -> Result<BTreeMap<String, f64>, String> {
    for output in &settings.outputs {
        if !out.join(output).exists() {
            return Err(format!("the program ended well but left no `{output}` in {}", out.display()));
        }
    }
    let Some(name) = &settings.metrics else { return Ok(BTreeMap::new()) };
    let path = out.join(name);
    let text = fs::read(&path).map_err(|error| format!("cannot read the metrics in {}: {error}", path.display()))?;
    let value: Value = serde_json::from_slice(&text)
        .map_err(|error| format!("the metrics in {} are no JSON: {error}", path.display()))?;
    let mut metrics = BTreeMap::new();
    collect("", &value, &mut metrics);
    if metrics.is_empty() { Err(format!("{} holds no number", path.display())) } else { Ok(metrics) }
}

/// Takes the finite numbers out of nested tables; texts and lists are left.
fn collect(name: &str, value: &Value, metrics: &mut BTreeMap<String, f64>) {
    match value {
        Value::Object(table) => {
            for (key, value) in table {
                let name = if name.is_empty() { key.clone() } else { format!("{name}/{key}") };
                collect(&name, value, metrics);
            }
        }
        Value::Number(number) => {
            if let Some(number) = number.as_f64().filter(|number| number.is_finite()) {
                metrics.insert(name.to_owned(), number);
            }
        }
        Value::Bool(value) => drop(metrics.insert(name.to_owned(), f64::from(u8::from(*value)))),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use deepgen_contract::artifact::ArtifactKind;
    use deepgen_contract::id::{Fingerprint, NodeName};
    use deepgen_contract::job::{JOB_VERSION, JobInput};
    use deepgen_contract::settings::Settings;

    fn job(settings: &CommandSettings) -> JobSpec {
        let input = JobInput {
            kind: ArtifactKind::Images,
            path: "/store/a b".into(),
            fingerprint: Fingerprint([1; 32]),
            node: NodeName("images".into()),
        };
        JobSpec {
            version: JOB_VERSION,
            node: NodeName("score".into()),
            stage: "command".into(),
            fingerprint: Fingerprint([2; 32]),
            attempt: 1,
            seed: 7,
            device: "cuda:1".into(),
            threads: 3,
            project_root: "/project".into(),
            settings: Settings::Command(settings.clone()),
            inputs: BTreeMap::from([("images".into(), input)]),
            earlier_attempts: Vec::new(),
            slot_ids: BTreeMap::from([("gpu".into(), vec![1, 3])]),
            peak_tflops: None,
            frozen_cache: None,
            remedies: Default::default(),
        }
    }

    fn words(command: &Command) -> Vec<String> {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|word| word.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn arguments_are_filled_in_and_never_split() {
        let argv =
            ["no-such-scorer", "{root}/score.py", "{input.images}", "--out={out}", "{seed}", "{threads}", "{device}"];
        let argv = argv.map(str::to_owned).to_vec();
        let settings =
            CommandSettings { argv, env: BTreeMap::from([("J".into(), "{job}".into())]), ..Default::default() };
        let command = process(&settings, &job(&settings), Path::new("/job/1"), &Programs::default());
        let expected = ["no-such-scorer", "/project/score.py", "/store/a b", "--out=/job/1/out", "7", "3", "cuda:0"];
        assert_eq!(words(&command), expected);
        let env: BTreeMap<_, _> = command.get_envs().collect();
        assert_eq!(env[std::ffi::OsStr::new("J")].unwrap(), "/job/1");
        assert_eq!(env[std::ffi::OsStr::new("CUDA_VISIBLE_DEVICES")].unwrap(), "1,3");
    }

    #[test]
    fn a_program_is_looked_for_once_unless_it_has_a_path_of_its_own_and_keeps_its_name() {
        let argv = ["sh", "-c", "echo $0"].map(str::to_owned).to_vec();
        let settings = CommandSettings { argv, ..Default::default() };
        let (job, programs, dir) = (job(&settings), Programs::default(), tempfile::tempdir().unwrap());
        let mut command = process(&settings, &job, dir.path(), &programs);
        assert!(Path::new(command.get_program()).is_absolute());
        assert_eq!(String::from_utf8_lossy(&command.output().unwrap().stdout), "sh\n");
        let settings = CommandSettings { env: BTreeMap::from([("PATH".into(), "/own".into())]), ..settings };
        assert_eq!(process(&settings, &job, dir.path(), &programs).get_program(), "sh");
    }

    #[test]
    fn a_shell_line_gets_quoted_paths_and_keeps_its_exit_status() {
        let dir = tempfile::tempdir().unwrap();
        let settings = CommandSettings { shell: "echo {input.images} >&2; exit 3".into(), ..Default::default() };
        let output = process(&settings, &job(&settings), dir.path(), &Programs::default()).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "/store/a b\n");
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(written_code(dir.path()), Some(3));
    }

    fn concluded(settings: &CommandSettings, code: Option<i32>, files: &[(&str, &str)]) -> Outcome {
        let dir = tempfile::tempdir().unwrap();
        let out: PathBuf = dir.path().join(OUT_DIR);
        fs::create_dir_all(&out).unwrap();
        files.iter().for_each(|(name, text)| fs::write(out.join(name), text).unwrap());
        conclude(settings, dir.path(), End { code, last_words: String::new() }, 1.0)
    }

    #[test]
    fn metrics_are_read_and_declared_outputs_must_be_there() {
        let settings = CommandSettings {
            outputs: vec!["table.csv".into()],
            metrics: Some("m.json".into()),
            success: vec![0, 5],
            ..Default::default()
        };
        let m = r#"{"overall": 0.5, "by": {"color": 1, "name": "x"}, "ok": true}"#;
        let Outcome::Done { metrics, .. } = concluded(&settings, Some(5), &[("table.csv", ""), ("m.json", m)]) else {
            panic!("it is done")
        };
        assert_eq!(
            metrics.into_iter().collect::<Vec<_>>(),
            [("by/color".to_owned(), 1.0), ("ok".to_owned(), 1.0), ("overall".to_owned(), 0.5),]
        );
        let failed = |code, files: &[(&str, &str)]| match concluded(&settings, code, files) {
            Outcome::Failed { cause, message } => (cause, message),
            other => panic!("{other:?}"),
        };
        assert!(failed(Some(0), &[("m.json", m)]).1.contains("left no `table.csv`"));
        assert!(failed(Some(0), &[("table.csv", ""), ("m.json", "{")]).1.contains("no JSON"));
        assert!(failed(Some(1), &[]).1.contains("exit code 1"));
        assert_eq!(failed(None, &[]).0, FailureCause::Lost);
    }
}
