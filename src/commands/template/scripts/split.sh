# Every third line of $1 is for testing.
awk -v out="$2" 'NR % 3 == 0 { print > (out "/test.txt"); next } { print > (out "/train.txt") }' "$1"
