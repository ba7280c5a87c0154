//! Did a worker that left no outcome die because memory ran out? Told from its last words, and from the kernel's count of
//! processes that it killed for want of memory.
//!
//! Knows signals and texts, not jobs. An allocation that fails on the host ends a program at once: it cannot say so itself.

use std::fs;
use std::path::PathBuf;

/// What the kernel sends to a process that it takes the memory from.
const SIGKILL: i32 = 9;

/// Returns how many processes of this control group the kernel has killed for want of memory; nothing where it does not say.
pub fn num_killed() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    counters(&groups).into_iter().find_map(|path| count(&fs::read_to_string(path).ok()?))
}

/// Returns where the count may stand, for the groups of `/proc/self/cgroup`: version 2, then version 1. Inside a container a
/// group's own folder is often mounted as the root.
fn counters(groups: &str) -> Vec<PathBuf> {
    let of = |group: &str, root: &str, file: &str| {
        let group = group.trim_start_matches('/');
        [PathBuf::from(root).join(group).join(file), PathBuf::from(root).join(file)]
    };
    let line = |line: &str| match line.splitn(3, ':').collect::<Vec<_>>()[..] {
        [_, "", group] => Some(of(group, "/sys/fs/cgroup", "memory.events")),
        [_, kinds, group] if kinds.split(',').any(|kind| kind == "memory") => {
            Some(of(group, "/sys/fs/cgroup/memory", "memory.oom_control"))
        }
        _ => None,
    };
    groups.lines().filter_map(line).flatten().collect()
}

/// Reads the line `oom_kill N`.
fn count(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// Returns true when a process that ended by `signal` and wrote this on standard error ran out of memory; `before` and `now` are
/// [`num_killed`] at its start and at its end.
pub fn ran_out(signal: Option<i32>, stderr: &str, before: Option<u64>, now: Option<u64>) -> bool {
    // What the Rust runtime says before it aborts.
    let said = stderr.lines().any(|line| line.contains("memory allocation of") && line.contains("bytes failed"));
    let is_taken = signal == Some(SIGKILL) && matches!((before, now), (Some(before), Some(now)) if now > before);
    said || is_taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_found_in_both_versions_of_control_groups() {
        let paths = counters("0::/user.slice/run.scope\n");
        assert_eq!(paths[0], PathBuf::from("/sys/fs/cgroup/user.slice/run.scope/memory.events"));
        assert_eq!(paths[1], PathBuf::from("/sys/fs/cgroup/memory.events"));
        let paths = counters("5:cpu,cpuacct:/a\n4:memory:/docker/b\n");
        assert_eq!(paths[0], PathBuf::from("/sys/fs/cgroup/memory/docker/b/memory.oom_control"));
        assert_eq!(count("low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n"), Some(2));
        assert_eq!(count("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"), Some(5));
        assert_eq!(count("oom_kill_disable 0\nunder_oom 0\n"), None);
    }

    #[test]
    fn a_kill_counts_as_want_of_memory_only_when_the_kernel_says_so() {
        assert!(ran_out(Some(SIGKILL), "", Some(1), Some(2)));
        assert!(!ran_out(Some(SIGKILL), "", Some(2), Some(2)), "somebody else killed it");
        assert!(!ran_out(Some(15), "", Some(1), Some(2)), "another process was meant");
        assert!(!ran_out(Some(SIGKILL), "", None, None));
        assert!(ran_out(Some(6), "\n  | memory allocation of 17179869184 bytes failed", None, None));
        assert!(!ran_out(Some(6), "\n  | told to fail", None, None));
    }
}
