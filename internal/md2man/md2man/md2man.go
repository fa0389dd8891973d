// Package md2man stands in for the module of this name, which urfave/cli imports to make manual pages, and viaduct does
// not use: its Markdown parser is set up at each start of a program, and that is a fifth of what a start takes. See the
// replace directive in go.mod.
package md2man

// Render returns doc as it is. Nothing calls it: viaduct makes its manual pages itself.
func Render(doc []byte) []byte { return doc }
