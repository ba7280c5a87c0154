//! Orchestrator and worker are killed at awkward moments; the next run finishes with the same artifacts and repeats
//! nothing that was sealed.

mod harness;

use std::collections::BTreeMap;
use std::fs;
use std::sync::OnceLock;
use std::time::Duration;

use harness::{Project, signal, wait_for};
use serde_json::json;

/// Training takes a while, so that there is time to be killed.
fn slow() -> Project {
    let project = Project::new();
    project.script(json!({ "sft": { "steps": 60, "step_ms": 20, "checkpoint_every": 5 } }));
    project
}

/// Returns the results of an undisturbed run of [`slow`].
fn undisturbed() -> &'static BTreeMap<String, String> {
    static RESULTS: OnceLock<BTreeMap<String, String>> = OnceLock::new();
    RESULTS.get_or_init(|| {
        let project = Project::new();
        project.script(json!({ "sft": { "steps": 60 } }));
        project.run().expect(0);
        project.results()
    })
}

/// Asserts that everything is there, equal to an undisturbed run, and that no node but `sft` ran twice.
fn assert_finished(project: &Project, attempts_of_sft: usize) {
    assert_eq!(&project.results(), undisturbed());
    for (node, attempts) in project.attempts() {
        assert_eq!(attempts, if node == "sft" { attempts_of_sft } else { 1 }, "attempts of {node}");
    }
}

#[test]
fn a_killed_orchestrator_finds_its_worker_again() {
    let project = slow();
    let running = project.start();
    project.wait_for_checkpoint("sft", 1, 5);
    running.kill();
    project.deepgen(&["status"]).expect(0).prints("interrupted");
    project.run().expect(0).says("goes on with a run");
    assert_finished(&project, 1);
    assert_eq!(project.manifests()["sft"]["attempts"], 1);
}

#[test]
fn a_worker_that_finished_without_an_orchestrator_is_sealed_without_running() {
    let project = slow();
    let running = project.start();
    project.wait_for_checkpoint("sft", 1, 50);
    running.kill();
    let job = project.job("sft", 1);
    wait_for("the outcome", || job.join("outcome.json").exists());
    // The worker ends right after its last word.
    std::thread::sleep(Duration::from_millis(300));
    project.run().expect(0);
    assert_finished(&project, 1);
}

#[test]
fn a_killed_worker_fails_the_run_and_the_next_run_continues_from_its_checkpoint() {
    let project = slow();
    let running = project.start();
    project.wait_for_checkpoint("sft", 1, 10);
    running.kill_worker("sft", 1);
    running.finish().expect(1).says("killed by signal 9");
    project.run().expect(0).says("sft: goes on from step");
    assert_finished(&project, 2);
}

#[test]
fn a_killed_worker_is_replaced_at_once_when_retries_are_allowed() {
    let project = slow();
    project.edit("pipelines/small.toml", "[node.sft]", "[node.sft]\nretries = 1");
    let running = project.start();
    project.wait_for_checkpoint("sft", 1, 10);
    running.kill_worker("sft", 1);
    running.finish().expect(0).says("sft: goes on from step");
    assert_finished(&project, 2);
}

#[test]
fn both_killed_at_once_lose_nothing_before_the_checkpoint() {
    let project = slow();
    let running = project.start();
    project.wait_for_checkpoint("sft", 1, 10);
    let worker = project.worker("sft", 1);
    running.kill();
    signal(worker, "KILL");
    project.run().expect(0).says("sft: goes on from step");
    assert_finished(&project, 2);
}

#[test]
fn a_kill_at_any_moment_leads_to_the_same_artifacts() {
    let project = slow();
    for delay_ms in [5, 25, 60, 110, 180, 260, 350, 500, 700] {
        let running = project.start();
        std::thread::sleep(Duration::from_millis(delay_ms));
        running.kill();
    }
    project.run().expect(0);
    assert_eq!(&project.results(), undisturbed());
    project.run().expect(0).prints("0 ran, 6 cached");
}

#[test]
fn an_orphan_of_an_earlier_attempt_cannot_be_sealed() {
    let project = slow();
    let running = project.start();
    project.wait_for_checkpoint("sft", 1, 5);
    let orphan = project.worker("sft", 1);
    // A stopped worker must not be left by its orchestrator: the kernel would hang it up. So first the kill. Then its
    // lease is made to name a process that is not there.
    running.kill();
    signal(orphan, "STOP");
    let lease = project.job("sft", 1).with_file_name("lease.json");
    let text = fs::read_to_string(&lease).unwrap();
    fs::write(&lease, text.replace(&format!("\"pid\":{orphan}"), "\"pid\":4194303")).unwrap();
    let second = project.start();
    wait_for("the second attempt", || project.attempts()["sft"] == 2);
    signal(orphan, "CONT");
    second.finish().expect(0);
    assert_finished(&project, 2);
    assert_eq!(project.manifests()["sft"]["attempts"], 2);
    wait_for("the orphan's end", || project.job("sft", 1).join("outcome.json").exists());
    project.run().expect(0).prints("0 ran, 6 cached");
    assert_finished(&project, 2);
}

#[test]
fn damaged_state_is_told_of_set_aside_and_made_again() {
    type Damage = fn(&Project);
    let damages: [(&str, Damage); 6] = [
        ("deleted", damage_delete),
        ("emptied", damage_empty),
        ("another database", damage_replace),
        ("garbage", damage_garbage),
        ("truncated", damage_truncate),
        ("a truncated snapshot", damage_snapshot),
    ];
    for (name, damage) in damages {
        let project = slow();
        let running = project.start();
        project.wait_for_checkpoint("sft", 1, 5);
        running.kill();
        damage(&project);
        let ran = project.run().expect(0).says("goes on with a run");
        let told = ["rebuilt the state", "aside", "up to its journal"];
        assert!(told.iter().any(|text| ran.stderr.contains(text)), "{name}: nothing is said:\n{}", ran.stderr);
        assert_finished(&project, 1);
        project.deepgen(&["state", "verify"]).expect(0);
        project.run().expect(0).prints("0 ran, 6 cached");
    }
}

fn database(project: &Project) -> std::path::PathBuf {
    project.path("artifacts/state/db")
}

fn damage_delete(project: &Project) {
    fs::remove_dir_all(database(project)).unwrap();
}

fn damage_empty(project: &Project) {
    damage_delete(project);
    fs::create_dir(database(project)).unwrap();
}

fn damage_replace(project: &Project) {
    damage_delete(project);
    sled::open(database(project)).unwrap().flush().unwrap();
}

fn damage_garbage(project: &Project) {
    fs::write(database(project).join("db"), [0x5A; 4096]).unwrap();
}

fn damage_truncate(project: &Project) {
    let db = database(project).join("db");
    let text = fs::read(&db).unwrap();
    fs::write(&db, &text[..text.len() / 3]).unwrap();
}

fn damage_snapshot(project: &Project) {
    fs::write(database(project).join("snap.00000000000FFFFF"), [0x5A; 5]).unwrap();
}

/// A tmpfs of a few MiB in a namespace of its own stands for the disk; the worker fills it when its result is complete.
#[test]
fn a_full_disk_while_sealing_loses_nothing() {
    let can_mount =
        std::process::Command::new("unshare").args(["-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]).status();
    if !can_mount.is_ok_and(|status| status.success()) {
        eprintln!("skipped: this machine does not let tests mount a file system of their own");
        return;
    }
    let script = r#"
        mount -t tmpfs -o size=6M tmpfs artifacts || exit 9
        "$@" > first.out 2> first.err; echo $? > first.code
        rm artifacts/filler
        echo '{ "sft": { "steps": 60 } }' > fake-worker.json
        "$@" > second.out 2> second.err || { cat second.err >&2; exit 8; }
        "$1" state verify > verify.out || { cat verify.out >&2; exit 7; }
        cat artifacts/store/*/parts/result.txt
        ls artifacts/store | grep -v '^................................................................$' >&2
        exit 0
    "#;
    let mut expected: Vec<&String> = undisturbed().values().collect();
    expected.sort();
    let mut num_failed = 0;
    for num_pages in [0, 1, 2, 3, 4, 6, 9, 14] {
        let project = Project::new();
        project.script(json!({ "sft": { "steps": 60, "fill_disk_but": num_pages } }));
        fs::create_dir(project.path("artifacts")).unwrap();
        let deepgen = project.run_command(&[]);
        let mut command = std::process::Command::new("unshare");
        command.args(["-rm", "sh", "-c", script, "sh"]).arg(deepgen.get_program()).args(deepgen.get_args());
        let ran: harness::Ran = command.current_dir(project.path(".")).output().unwrap().into();
        let read = |name: &str| fs::read_to_string(project.path(name)).unwrap();
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{num_pages} pages: {}", read("first.err"));
        let mut results: Vec<String> =
            ran.stdout.as_bytes().chunks(64).map(|text| String::from_utf8_lossy(text).into()).collect();
        results.sort();
        assert_eq!(results.iter().collect::<Vec<_>>(), expected, "{num_pages} pages");
        if read("first.code").trim() != "0" {
            num_failed += 1;
            assert_eq!(read("first.code").trim(), "1", "{num_pages} pages: {}", read("first.err"));
            let said = read("first.err").to_lowercase();
            assert!(said.contains("no space left") || said.contains("no storage space"), "{num_pages} pages: {said}");
        }
    }
    assert!(num_failed > 0, "the disk was never full");
}

#[test]
fn a_torn_last_line_of_the_journal_is_survived() {
    let project = slow();
    let running = project.start();
    project.wait_for_checkpoint("sft", 1, 5);
    running.kill();
    let run = project.status()["run"].as_str().unwrap().to_owned();
    let journal = project.path(&format!("artifacts/runs/{run}/journal.jsonl"));
    let text = fs::read(&journal).unwrap();
    fs::write(&journal, &text[..text.len() - 20]).unwrap();
    project.run().expect(0);
    assert_finished(&project, 1);
}
