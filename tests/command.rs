//! External programs as nodes: run, cached, rerun when a script changes, killed, adopted, refused when they are wrong.

mod harness;

use std::fs;
use std::time::Duration;

use harness::{Project, wait_for};

/// Two commands: `count` reads a data file through a script, `double` reads what `count` made.
const PIPELINE: &str = r#"
[pipeline]
name = "small"
seed = 7

[node.count]
stage = "command"
set.argv = ["sh", "{root}/data/count.sh", "{root}/data/words.txt", "{out}/count.txt"]
set.files = ["../data/count.sh", "../data/words.txt"]
set.outputs = ["count.txt"]

[node.double]
stage = "command"
inputs = { count = "count" }
set.shell = '''
read -r n < {input.count}/count.txt
echo "doubling $n with seed {seed}" >&2
printf '{"result": %s, "by": {"two": 2}}' $((n * 2)) > {out}/score.json
'''
set.metrics = "score.json"
set.output_kind = "scores"
"#;

fn project() -> Project {
    let project = Project::new();
    project.write("pipelines/small.toml", PIPELINE);
    project.write("data/words.txt", "one two three\n");
    project.write("data/count.sh", "tr ' ' '\\n' < \"$1\" | wc -l | tr -d ' ' > \"$2\"\n");
    project
}

#[test]
fn commands_are_run_without_a_worker_and_their_results_sealed() {
    let project = project();
    project.run().expect(0);
    let double = &project.manifests()["double"];
    assert_eq!(double["metrics"]["result"], 6.0);
    assert_eq!(double["metrics"]["by/two"], 2.0);
    assert_eq!(double["kind"], "scores");
    assert_eq!(double["files"][0]["path"], "score.json");
    let stderr = fs::read_to_string(project.job("double", 1).join("stderr.log")).unwrap();
    assert_eq!(stderr, "doubling 3 with seed 7\n");
    project.deepgen(&["plan", "pipelines/small.toml"]).expect(0).prints("cached");
}

#[test]
fn a_changed_script_or_data_file_reruns_what_depends_on_it() {
    let project = project();
    project.run().expect(0);
    project.write("data/words.txt", "one two three four\n");
    project.deepgen(&["plan", "pipelines/small.toml"]).expect(0).prints("data/words.txt");
    project.run().expect(0);
    assert_eq!(project.manifests()["double"]["metrics"]["result"], 8.0);
    assert_eq!(project.attempts()["double"], 1);
}

#[test]
fn a_program_that_fails_is_shown_with_its_last_words() {
    let project = project();
    project.edit("pipelines/small.toml", "read -r n", "echo no such luck >&2; exit 4; read -r n");
    project.run().expect(1).says("exit code 4").says("no such luck");
    assert_eq!(project.states()["count"], "done");
}

#[test]
fn a_declared_output_that_is_missing_fails_the_node() {
    let project = project();
    project.edit("pipelines/small.toml", r#"set.outputs = ["count.txt"]"#, r#"set.outputs = ["counts.txt"]"#);
    project.run().expect(1).says("left no `counts.txt`");
    assert_eq!(project.states()["double"], "blocked");
}

/// `double` takes its time; the test decides how long.
fn slow() -> Project {
    let project = project();
    project.edit("pipelines/small.toml", "read -r n", "while [ ! -e {root}/go ]; do sleep 0.05; done\nread -r n");
    project
}

#[test]
fn a_shell_line_that_outlived_its_orchestrator_is_adopted() {
    let project = slow();
    let running = project.start();
    project.wait_for_state("double", "running");
    project.wait_for_worker("double", 1);
    running.kill();
    project.write("go", "");
    project.run().expect(0);
    assert_eq!(project.manifests()["double"]["metrics"]["result"], 6.0);
    assert_eq!(project.attempts()["double"], 1);
}

#[test]
fn a_command_that_is_killed_is_run_again() {
    let project = slow();
    project.edit("pipelines/small.toml", "set.metrics", "retries = 1\nset.metrics");
    let running = project.start();
    project.wait_for_state("double", "running");
    project.wait_for_worker("double", 1);
    running.kill_worker("double", 1);
    project.write("go", "");
    running.finish().expect(0).says("killed by signal 9");
    assert_eq!(project.attempts()["double"], 2);
}

#[test]
fn a_stopped_run_ends_its_command_and_goes_on_later() {
    let project = slow();
    let running = project.start();
    project.wait_for_state("double", "running");
    project.wait_for_worker("double", 1);
    let pid = project.worker("double", 1);
    running.terminate();
    wait_for("its end", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(project.states()["double"], "stopped");
    project.write("go", "");
    project.run().expect(0);
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(project.attempts()["double"], 2);
}

#[test]
fn wrong_commands_are_refused_with_their_place() {
    let project = project();
    let text = PIPELINE
        .replace("{out}/count.txt", "{output}/count.txt")
        .replace("{input.count}/count.txt", "{input.counts}/count.txt")
        .replace(r#"outputs = ["count.txt"]"#, r#"outputs = ["../count.txt"]"#)
        + "\n[node.none]\nstage = \"command\"\n[node.both]\nstage = \"command\"\nset.argv = [\"true\"]\nset.shell = \"true\"\n";
    project.write("pipelines/small.toml", &text);
    let ran = project.run().expect(2);
    insta::assert_snapshot!(ran.stderr.replace(&*project.path("").to_string_lossy(), "PROJECT/"));
}
